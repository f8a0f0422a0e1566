//! Rule 2: an outcome is seen by all who may read it, cleared once, and not found after it was forgotten.
//!
//! Loom checks every access to the outcome's cell: a read that may overlap a write fails the model.

use std::sync::Arc;

use llm_batch_coalesce::clock::{self, FOREVER};
use llm_batch_coalesce::flight::State;
use loom::thread;

use crate::support::{
    SECOND, Served, Turn, hit, hold_clock, join, join_as_task, lead, new_map, request, sit, turn,
};

#[test]
fn a_hit_sees_the_whole_outcome() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || hit(&map))
        };
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        let hit = other.join().expect("no panic");
        assert!(matches!(hit, None | Some(1)), "{hit:?}");
    });
}

#[test]
fn an_outcome_that_is_not_retained_is_cleared_by_the_last_who_reads_it() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let outcome = Arc::new(1);
        let readers = [(); 2].map(|()| {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || join(&map, &flight).map(|place| sit(&place, 2, 0)))
        });
        let flight = Arc::clone(leads.flight());
        assert!(leads.complete(Arc::clone(&outcome), 0, false));
        for reader in readers {
            let served = reader.join().expect("no panic");
            assert!(matches!(served, None | Some(Served::Shared(1))), "{served:?}");
        }
        assert_eq!((Arc::strong_count(&outcome), flight.state()), (1, State::Ended));
    });
}

#[test]
fn an_outcome_that_is_not_retained_is_cleared_though_a_waiter_leaves_it_unread() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let outcome = Arc::new(1);
        let (other_map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
        let reader = thread::spawn(move || join(&other_map, &flight).map(|place| sit(&place, 2, 0)));
        let (other_map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
        let leaver = thread::spawn(move || drop(join_as_task(&other_map, &flight)));
        let flight = Arc::clone(leads.flight());
        assert!(leads.complete(Arc::clone(&outcome), 0, false));
        leaver.join().expect("no panic");
        reader.join().expect("no panic");
        assert_eq!((Arc::strong_count(&outcome), flight.state()), (1, State::Ended));
    });
}

#[test]
fn who_asks_after_clear_leads_though_the_old_flight_is_landing() {
    loom::model(|| {
        let map = new_map();
        let old = lead(&map);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                map.clear();
                let Turn::Lead(new) = turn(&map) else { panic!("everything was forgotten") };
                assert!(new.complete(Arc::new(2), FOREVER, false));
            })
        };
        assert!(old.complete(Arc::new(1), FOREVER, false));
        other.join().expect("no panic");
        assert_eq!(hit(&map), Some(2));
        assert_eq!((map.stats().in_flight, map.stats().retained, map.keys()), (0, 1, 1));
    });
}

#[test]
fn clear_takes_nothing_from_a_waiter_and_leaves_nothing_behind() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let place = join(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || map.clear())
        };
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        assert_eq!(sit(&place, 2, FOREVER), Served::Shared(1));
        other.join().expect("no panic");
        assert_eq!(request(&map, 3, FOREVER), Served::Led);
        assert_eq!((map.stats().in_flight, map.stats().retained, map.keys()), (0, 1, 1));
    });
}

#[test]
fn what_expires_takes_no_newer_flight_of_its_key_along() {
    let _clock = hold_clock();
    loom::model(|| {
        let map = new_map();
        assert!(lead(&map).complete(Arc::new(1), 1, false));
        clock::advance(SECOND);
        let sweeper = {
            let map = Arc::clone(&map);
            thread::spawn(move || map.keys())
        };
        assert_eq!(request(&map, 2, FOREVER), Served::Led);
        sweeper.join().expect("no panic");
        assert_eq!(hit(&map), Some(2));
        assert_eq!((map.stats().in_flight, map.stats().retained, map.keys()), (0, 1, 1));
    });
}
