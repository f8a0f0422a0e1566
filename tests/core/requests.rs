//! Each request ends in exactly one of the counts, whatever becomes of it.

use std::time::Duration;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::stats::Stats;

use crate::ops::{cancel, lead_in_task, put};
use crate::support::{Clock, Outcome, Plain, Tasks, hash, hit, join, join_as, lead, read};

const KEY: u64 = 7;

/// Calls, joined, hits, timeouts and cancelled: what a request ends in.
fn ends(map: &Map<Plain>) -> [u64; 5] {
    let stats = map.stats();
    [stats.calls, stats.joined, stats.hits, stats.timeouts, stats.cancelled]
}

#[test]
fn a_leader_is_a_call_whatever_becomes_of_it() {
    let map = Map::<Plain>::new(Settings::default());
    assert!(lead(&map, 0).complete(Outcome::new(1), FOREVER, false));
    assert!(lead(&map, 1).complete(Outcome::new(1), 0, true));
    drop(lead(&map, 2));
    lead(&map, 3).abandon(true);
    lead(&map, 4).lose_loop();
    assert_eq!((ends(&map), map.stats().errors), ([5, 0, 0, 0, 0], 2));
}

#[test]
fn a_caller_that_leaves_its_own_call_is_a_call_and_nothing_else() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_in_task(&map, KEY, 1, tasks.task(0), false);
    drop(led.caller);
    assert!(led.call.cancelled());
    assert_eq!(ends(&map), [1, 0, 0, 0, 0]);
    drop(led.lead);
    assert_eq!((ends(&map), map.stats().in_flight), ([1, 0, 0, 0, 0], 0));
}

#[test]
fn a_waiter_that_was_served_has_joined() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((read(&waiter), ends(&map)), (1, [1, 0, 0, 0, 0]));
    waiter.count_joined();
    waiter.count_joined();
    drop(waiter);
    assert_eq!(ends(&map), [1, 1, 0, 0, 0]);
}

#[test]
fn a_waiter_whose_timeout_has_passed_is_a_timeout() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert_eq!(waiter.wait(Some(Duration::ZERO)), Standing::Waiting);
    waiter.count_timeout();
    drop(waiter);
    assert_eq!((ends(&map), leads.flight().waiters()), ([1, 0, 0, 1, 0], 0));
}

#[test]
fn who_does_not_want_to_wait_is_a_timeout_without_a_place() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    map.count_timeout(hash(KEY));
    assert_eq!((ends(&map), leads.flight().waiters()), ([1, 0, 0, 1, 0], 0));
}

#[test]
fn a_waiter_that_goes_unserved_is_cancelled() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    drop(join(&map, KEY));
    drop(join_as(&map, KEY, 1, tasks.task(1)));
    assert_eq!(ends(&map), [1, 0, 0, 0, 2]);
    let waiter = join(&map, KEY);
    assert!(cancel(&map, KEY));
    drop(waiter);
    assert_eq!(ends(&map), [1, 0, 0, 0, 3]);
    drop(leads);

    // One that was interrupted after the outcome was there, too.
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert!(leads.complete(Outcome::new(1), 0, false));
    drop(waiter);
    assert_eq!(ends(&map), [2, 0, 0, 0, 4]);
}

#[test]
fn a_waiter_that_takes_over_is_a_call_and_handed_over() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (first, second) = (join(&map, KEY), join(&map, KEY));
    drop(leads);
    // It goes with the offer in its hands.
    drop(first);
    let leads = second.take_lead(0).expect("it was offered");
    drop(second);
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((ends(&map), map.stats().handed_over), ([2, 0, 0, 0, 1], 1));
}

#[test]
fn a_waiter_that_asks_again_is_counted_by_its_next_attempt() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let lost = join_as(&map, KEY, 1, tasks.lost(1));
    let heir = join(&map, KEY);
    drop(leads);
    assert_eq!(lost.standing(), Standing::Withdrawn);
    lost.ask_again();
    drop(lost);
    assert_eq!(ends(&map), [1, 0, 0, 0, 0]);
    let again = join(&map, KEY);
    assert!(heir.take_lead(0).expect("it was offered").complete(Outcome::new(2), FOREVER, false));
    again.count_joined();
    drop((again, heir));
    assert_eq!(ends(&map), [2, 1, 0, 0, 0]);
}

#[test]
fn a_timeout_of_one_that_asks_again_is_not_counted_twice() {
    let map = Map::<Plain>::new(Settings::default());
    let _leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    waiter.ask_again();
    waiter.count_timeout();
    waiter.count_joined();
    drop(waiter);
    assert_eq!(ends(&map), [1, 0, 0, 0, 0]);
}

#[test]
fn counting_may_start_anew_but_what_is_there_stays() {
    let map = Map::<Plain>::with_shards(1, Settings { max_retained: Some(1), ..Settings::default() });
    for key in 0..3 {
        assert!(lead(&map, key).complete(Outcome::new(key), FOREVER, true));
    }
    let leads = lead(&map, KEY);
    let (hasty, gone, later) = (join(&map, KEY), join(&map, KEY), join(&map, KEY));
    hasty.count_timeout();
    drop((hasty, gone));
    map.count_timeout(hash(KEY));
    assert_eq!(hit(&map, 2), Some(2));
    let before = map.stats();
    assert_eq!((before.errors, before.evicted, ends(&map)), (3, 2, [4, 0, 1, 2, 1]));

    map.reset_stats();
    assert_eq!(map.stats(), Stats { in_flight: 1, retained: 1, ..Stats::default() });
    assert_eq!(hit(&map, 2), Some(2));
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    later.count_joined();
    put(&map, 8, Outcome::new(1), FOREVER);
    let after = Stats { joined: 1, hits: 1, evicted: 2, retained: 1, ..Stats::default() };
    assert_eq!(map.stats(), after);

    map.reset_stats();
    map.reset_stats();
    assert_eq!(map.stats(), Stats { retained: 1, ..Stats::default() });
}
