//! Rule 10: of outcomes that come at once as many are dropped as are too many, and what goes makes room once.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::lead::Lead;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::waiter::{NO_LOOP, Origin};
use loom::thread;

use crate::support::{KEY, Plain, forget, hit, load};

fn room_for(most: u64) -> Arc<Map<Plain>> {
    Map::with_shards(1, Settings { max_retained: Some(most), ..Settings::default() })
}

fn lead(map: &Arc<Map<Plain>>, key: u64) -> Lead<Plain> {
    let Ok(lead) = map.claim(key, key, Origin { loop_id: NO_LOOP, thread: 0 });
    lead.expect("nobody else leads")
}

fn complete(lead: Lead<Plain>) {
    assert!(lead.complete(Arc::new(1), FOREVER, false));
}

/// There is at most one a shard too many, and the next one puts that right.
#[test]
fn of_outcomes_that_land_at_once_as_many_are_dropped_as_are_too_many() {
    loom::model(|| {
        let map = room_for(1);
        let (first, second) = (lead(&map, KEY), lead(&map, KEY + 1));
        let other = thread::spawn(move || complete(second));
        complete(first);
        other.join().expect("no panic");
        let (_, retained, _) = load(&map);
        assert!(matches!(retained, 1 | 2));
        assert_eq!(retained + map.stats().evicted, 2);
        complete(lead(&map, KEY + 2));
        assert_eq!((load(&map), map.stats().evicted), ((0, 1, 1), 2));
    });
}

/// Whatever is there gives way to newer ones without another being dropped, until the room is full.
fn is_room_for_two(map: &Arc<Map<Plain>>) {
    map.clear();
    let evicted = || map.stats().evicted;
    let before = evicted();
    for key in [10, 11] {
        complete(lead(map, key));
    }
    assert_eq!((load(map), evicted()), ((0, 2, 2), before));
    complete(lead(map, 12));
    assert_eq!((load(map), evicted()), ((0, 2, 2), before + 1));
}

/// The room that it may have taken is given back, and once.
#[test]
fn what_is_forgotten_while_it_lands_makes_room_once() {
    loom::model(|| {
        let map = room_for(2);
        let leads = lead(&map, KEY);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || forget(&map))
        };
        complete(leads);
        other.join().expect("no panic");
        assert_eq!((hit(&map), load(&map), map.stats().evicted), (None, (0, 0, 0), 0));
        is_room_for_two(&map);
    });
}

/// It leaves for want of room or because it was forgotten, and gives its room back once.
#[test]
fn what_is_forgotten_while_it_is_pushed_out_goes_once() {
    loom::model(|| {
        let map = room_for(2);
        complete(lead(&map, KEY));
        complete(lead(&map, KEY + 1));
        let leads = lead(&map, KEY + 2);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || forget(&map))
        };
        complete(leads);
        other.join().expect("no panic");
        assert_eq!(hit(&map), None);
        is_room_for_two(&map);
    });
}
