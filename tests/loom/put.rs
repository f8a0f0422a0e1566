//! Rule 9: what is put is what is found from then on, whatever lands at that moment; who waits gets what it waits for.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use loom::thread;

use crate::support::{
    Served, forget, hit, join, join_as_task, lead, load, new_map, put, request, requests, sit,
};

/// Nothing else is retained, the waiter gets the call's own outcome, and the counters add up.
#[test]
fn what_is_put_while_a_flight_lands_stays() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let place = join(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || put(&map, 2))
        };
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        assert_eq!(sit(&place, 3, 0), Served::Shared(1));
        other.join().expect("no panic");
        assert_eq!((hit(&map), load(&map)), (Some(2), (0, 1, 1)));
        assert_eq!((map.stats().calls, requests(&map)), (1, 3));
    });
}

/// The waiter leads and gets no outcome of others; its own is not retained.
#[test]
fn what_is_put_while_a_lead_is_given_up_stays() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let heir = join_as_task(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || put(&map, 2))
        };
        drop(leads);
        let leads = heir.take_lead(0).expect("it was offered");
        assert!(leads.complete(Arc::new(3), FOREVER, false));
        other.join().expect("no panic");
        assert_eq!((hit(&map), load(&map)), (Some(2), (0, 1, 1)));
    });
}

/// Either request or outcome comes first, but what was put is there in the end, and the request counts once.
#[test]
fn what_is_put_while_a_key_is_claimed_stays() {
    loom::model(|| {
        let map = new_map();
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 3, FOREVER))
        };
        put(&map, 2);
        let theirs = other.join().expect("no panic");
        assert!(matches!(theirs, Served::Led | Served::Shared(2)), "{theirs:?}");
        assert_eq!((requests(&map), load(&map)), (1, (0, 1, 1)));
        assert_eq!(hit(&map), Some(2));
    });
}

/// From the claim on the key is under way or retained, so whoever asks need not lead.
#[test]
fn who_asks_while_a_flight_lands_and_something_is_put_gets_one_of_the_two() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let asks = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 3, FOREVER))
        };
        let puts = {
            let map = Arc::clone(&map);
            thread::spawn(move || put(&map, 2))
        };
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        let theirs = asks.join().expect("no panic");
        puts.join().expect("no panic");
        assert!(matches!(theirs, Served::Shared(1 | 2)), "{theirs:?}");
        assert_eq!((requests(&map), load(&map)), (2, (0, 1, 1)));
        assert_eq!(hit(&map), Some(2));
    });
}

/// One of the two is there in the end, and the other one is dropped.
#[test]
fn of_two_outcomes_that_are_put_at_once_one_stays() {
    loom::model(|| {
        let map = new_map();
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || put(&map, 2))
        };
        put(&map, 1);
        other.join().expect("no panic");
        assert_eq!(load(&map), (0, 1, 1));
        assert!(matches!(hit(&map), Some(1 | 2)));
    });
}

/// The books are right though an outcome is dropped before it was noted.
#[test]
fn what_is_put_while_its_key_is_forgotten_is_there_or_not() {
    loom::model(|| {
        let map = new_map();
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || forget(&map))
        };
        put(&map, 1);
        let forgotten = other.join().expect("no panic");
        let left = u64::from(!forgotten);
        assert_eq!((hit(&map), load(&map)), ((!forgotten).then_some(1), (0, left, usize::from(!forgotten))));
    });
}
