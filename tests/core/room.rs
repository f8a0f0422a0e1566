//! A map that retains a limited number of outcomes drops the oldest ones, and no others.

use std::sync::mpsc;
use std::sync::{Arc, Barrier};
use std::thread;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::ops::{cancel, forget, load, put};
use crate::support::{
    Clock, Outcome, Plain, SECOND, Served, contains, eventually, hit, in_time, join, lead, read, request,
};

/// All keys of a map with one shard are of the same age group.
fn map(shards: usize, most: u64) -> Arc<Map<Plain>> {
    Map::with_shards(shards, Settings { max_retained: Some(most), ..Settings::default() })
}

fn complete(map: &Arc<Map<Plain>>, key: u64) {
    assert!(lead(map, key).complete(Outcome::new(key), FOREVER, false));
}

/// The same with a call or without one.
fn fill(map: &Arc<Map<Plain>>, key: u64) {
    if key.is_multiple_of(2) {
        put(map, key, Outcome::new(key), FOREVER);
    } else {
        complete(map, key);
    }
}

/// The keys of these that are retained.
fn retained(map: &Map<Plain>, keys: std::ops::Range<u64>) -> Vec<u64> {
    keys.filter(|&key| hit(map, key) == Some(key)).collect()
}

#[test]
fn nothing_is_dropped_up_to_the_limit() {
    for shards in [1, 4, 64] {
        let map = map(shards, 100);
        for key in 0..100 {
            fill(&map, key);
        }
        assert_eq!((retained(&map, 0..100).len(), map.stats().evicted, load(&map)), (100, 0, (0, 100)));
    }
}

#[test]
fn the_oldest_completion_goes_first_whatever_the_order_of_the_claims() {
    let map = map(1, 3);
    let (sender, dropped) = mpsc::channel();
    let mut leads: Vec<_> = (0..5).map(|key| (key, lead(&map, key))).collect();
    for place in [2, 0, 1] {
        let (key, lead) = leads.remove(place);
        assert!(lead.complete(Outcome::watched(key, &sender), FOREVER, false));
    }
    assert_eq!((retained(&map, 0..5), map.stats().evicted), (vec![0, 2, 3], 0));
    // 2, 0 and 3 have completed, in this order.
    for (key, lead) in leads {
        assert!(lead.complete(Outcome::watched(key, &sender), FOREVER, false));
    }
    assert_eq!((retained(&map, 0..5), map.stats().evicted), (vec![1, 3, 4], 2));
    assert_eq!((dropped.try_iter().collect::<Vec<_>>(), map.keys(), load(&map)), (vec![2, 0], 3, (0, 3)));
}

#[test]
fn who_was_read_last_is_of_no_account() {
    let map = map(1, 2);
    complete(&map, 0);
    complete(&map, 1);
    assert_eq!(hit(&map, 0), Some(0));
    complete(&map, 2);
    assert_eq!(retained(&map, 0..3), [1, 2]);
}

#[test]
fn the_newest_stays_however_small_the_limit() {
    for most in [0, 1] {
        let map = map(1, most);
        for key in 0..10 {
            complete(&map, key);
            assert_eq!((retained(&map, 0..10), map.stats().evicted, load(&map)), (vec![key], key, (0, 1)));
        }
        put(&map, 10, Outcome::new(10), FOREVER);
        assert_eq!((retained(&map, 0..11), map.stats().evicted), (vec![10], 10));
    }
}

#[test]
fn no_operation_leaves_more_than_the_limit_and_one_a_shard() {
    for (shards, most) in [(1, 10), (8, 10), (8, 1), (64, 20)] {
        let map = map(shards, most);
        for key in 0..1000 {
            fill(&map, key);
            let stats = map.stats();
            assert!(stats.retained <= most + shards as u64, "{} of {most}", stats.retained);
            assert!(stats.retained >= most.min(key + 1), "{} of {most}", stats.retained);
            assert_eq!(stats.retained + stats.evicted, key + 1);
            assert_eq!(hit(&map, key), Some(key), "the newest is there");
        }
        assert_eq!(map.keys() as u64, map.stats().retained);
    }
}

#[test]
fn flights_under_way_do_not_count() {
    let map = map(1, 2);
    let leads: Vec<_> = (10..30).map(|key| lead(&map, key)).collect();
    complete(&map, 0);
    complete(&map, 1);
    assert_eq!((retained(&map, 0..2), map.stats().evicted, load(&map)), (vec![0, 1], 0, (20, 2)));
    complete(&map, 2);
    assert_eq!((retained(&map, 0..3), load(&map)), (vec![1, 2], (20, 2)));
    assert!((10..30).all(|key| contains(&map, key)));
    // Nor do those that retain nothing.
    for lead in leads {
        assert!(lead.complete(Outcome::new(0), 0, false));
    }
    assert_eq!((retained(&map, 0..3), map.stats().evicted, load(&map)), (vec![1, 2], 1, (0, 2)));
}

#[test]
fn a_key_that_was_dropped_is_led_anew() {
    let map = map(1, 1);
    complete(&map, 0);
    let leads = lead(&map, 1);
    let waiter = join(&map, 1);
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((read(&waiter), contains(&map, 0)), (1, false));
    let leads = lead(&map, 0);
    let waiter = join(&map, 0);
    assert_eq!(waiter.standing(), Standing::Waiting);
    assert!(leads.complete(Outcome::new(0), FOREVER, false));
    assert_eq!((read(&waiter), retained(&map, 0..2), map.stats().evicted), (0, vec![0], 2));
}

/// Fills a map, makes room for one outcome in the given way, and sees that there is room for one and no more.
fn gives_room_back(make_room: impl FnOnce(&Arc<Map<Plain>>, &Clock)) {
    let clock = Clock::hold();
    let map = map(1, 3);
    assert!(lead(&map, 0).complete(Outcome::new(0), 3600 * SECOND, false));
    complete(&map, 1);
    complete(&map, 2);
    make_room(&map, &clock);
    complete(&map, 3);
    assert_eq!((retained(&map, 1..4), map.stats().evicted, load(&map)), (vec![1, 2, 3], 0, (0, 3)));
    complete(&map, 4);
    assert_eq!((retained(&map, 1..5), map.stats().evicted, load(&map)), (vec![2, 3, 4], 1, (0, 3)));
}

#[test]
fn a_key_that_is_forgotten_gives_room_back() {
    gives_room_back(|map, _| assert!(forget(map, 0)));
}

#[test]
fn what_has_expired_gives_room_back() {
    gives_room_back(|map, clock| {
        clock.advance(3601 * SECOND);
        assert_eq!(map.keys(), 2);
    });
}

#[test]
fn what_has_expired_takes_no_room_though_nobody_has_dropped_it() {
    gives_room_back(|_, clock| clock.advance(3601 * SECOND));
}

#[test]
fn what_the_sweeper_drops_gives_room_back() {
    in_time(|| {
        gives_room_back(|map, clock| {
            clock.advance(3601 * SECOND);
            eventually(|| map.stats().retained == 2);
        });
    });
}

#[test]
fn a_new_flight_of_an_expired_key_gives_room_back() {
    gives_room_back(|map, clock| {
        clock.advance(3601 * SECOND);
        assert!(lead(map, 0).complete(Outcome::new(0), 0, false));
    });
}

#[test]
fn an_outcome_that_is_replaced_gives_room_back() {
    gives_room_back(|map, _| {
        put(map, 1, Outcome::new(1), FOREVER);
        put(map, 2, Outcome::new(2), FOREVER);
        assert_eq!((map.stats().retained, map.stats().evicted), (3, 0));
        assert!(forget(map, 0));
    });
}

#[test]
fn what_is_cleared_gives_room_back() {
    gives_room_back(|map, _| {
        let leads = lead(map, 9);
        map.clear();
        assert!(leads.complete(Outcome::new(9), FOREVER, false));
        complete(map, 1);
        complete(map, 2);
    });
}

#[test]
fn a_flight_that_was_forgotten_or_cancelled_takes_no_room() {
    gives_room_back(|map, _| {
        let leads = [8, 9].map(|key| lead(map, key));
        assert!(forget(map, 8) && cancel(map, 9) && forget(map, 0));
        for leads in leads {
            assert!(leads.complete(Outcome::new(9), FOREVER, false));
        }
    });
}

#[test]
fn the_limit_holds_after_thousands_that_were_forgotten() {
    let map = map(1, 100);
    for key in 0..5000 {
        complete(&map, key);
        if key % 5 != 0 {
            assert!(forget(&map, key));
        }
    }
    // Every fifth was left; the last ones that were forgotten have pushed one of these out before.
    assert_eq!((map.stats().retained, map.stats().evicted, map.keys()), (99, 901, 99));
    assert_eq!(retained(&map, 0..5000), (901..1000).map(|key| 5 * key).collect::<Vec<_>>());
}

#[test]
fn the_limit_holds_for_many_threads() {
    const THREADS: u64 = 4;
    const KEYS: u64 = 2000;
    in_time(|| {
        let (shards, most) = (8, 50);
        let map = map(shards, most);
        let barrier = Barrier::new(4);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (map, barrier) = (&map, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for key in (0..KEYS).map(|key| THREADS * key + thread) {
                        let led = request(map, key, |lead| {
                            assert!(lead.complete(Outcome::new(key), FOREVER, false));
                        });
                        assert_eq!(led, Served::Led);
                        if key % 7 == 0 {
                            forget(map, key);
                        }
                    }
                });
            }
        });
        let stats = map.stats();
        assert!((most..=most + shards as u64).contains(&stats.retained), "{stats:?}");
        assert_eq!(map.keys() as u64, stats.retained);
        // One thread alone brings it back to the limit, and the count is still right.
        map.clear();
        let evicted = map.stats().evicted;
        for key in 0..most {
            complete(&map, key);
        }
        assert_eq!((load(&map), map.stats().evicted), ((0, most), evicted));
    });
}
