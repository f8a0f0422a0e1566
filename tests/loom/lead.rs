//! Rule 4: of all that may end a flight one does, and a stale lead publishes nothing.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::seat::Standing;
use loom::thread;

use crate::support::{FakeCall, LOOP, Served, join_as_task, lead_on, new_map, request};

#[test]
fn a_call_that_completes_while_its_loop_is_found_closed_counts_once() {
    loom::model(|| {
        let map = new_map();
        let leads = lead_on(&map, LOOP);
        let caller = leads.seat_caller(LOOP, false);
        let call = Arc::new(FakeCall::default());
        leads.led_by(Arc::clone(&call));
        call.lose();
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        let completed = leads.complete(Arc::new(1), FOREVER, false);
        let theirs = other.join().expect("no panic");
        if completed {
            assert_eq!((caller.standing(), theirs), (Standing::Landed, Served::Shared(1)));
        } else {
            assert_eq!((caller.standing(), theirs), (Standing::Cancelled, Served::Led));
        }
        assert_eq!((map.stats().in_flight, map.stats().retained, map.keys()), (0, 1, 1));
    });
}

#[test]
fn a_lead_that_was_taken_away_does_not_end_the_next_ones_flight() {
    loom::model(|| {
        let map = new_map();
        let stale = lead_on(&map, LOOP);
        let call = Arc::new(FakeCall::default());
        let caller = stale.seat_caller(LOOP, false);
        stale.led_by(Arc::clone(&call));
        let heir = join_as_task(&map, stale.flight()).expect("it is pending");
        call.lose();
        // From elsewhere: finds the loop closed, so `heir` is offered the lead.
        assert!(join_as_task(&map, stale.flight()).is_some());
        let other = thread::spawn(move || {
            let new = heir.take_lead(0).expect("it was offered");
            assert!(new.complete(Arc::new(2), FOREVER, false));
        });
        assert!(!stale.complete(Arc::new(1), FOREVER, false));
        other.join().expect("no panic");
        drop(caller);
        assert_eq!(request(&map, 3, FOREVER), Served::Shared(2));
        assert_eq!(map.stats().in_flight, 0);
    });
}

#[test]
fn who_joins_while_the_last_caller_leaves_is_in_a_living_call_or_leads() {
    loom::model(|| {
        let map = new_map();
        let leads = lead_on(&map, LOOP);
        let caller = leads.seat_caller(LOOP, false);
        let call = Arc::new(FakeCall::default());
        leads.led_by(Arc::clone(&call));
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, 0))
        };
        drop(caller);
        let cancelled = call.cancelled();
        assert_eq!(leads.complete(Arc::new(1), 0, false), !cancelled);
        let theirs = other.join().expect("no panic");
        assert!(!cancelled || theirs == Served::Led, "{theirs:?} of a cancelled call");
        assert_eq!(call.cancelled(), cancelled, "a call that others wait for was cancelled");
        assert_eq!(map.stats().in_flight, 0);
    });
}

#[test]
fn a_lead_that_was_taken_away_is_no_longer_there_to_be_handed_over() {
    loom::model(|| {
        let map = new_map();
        let stale = lead_on(&map, LOOP);
        let call = Arc::new(FakeCall::default());
        stale.led_by(Arc::clone(&call));
        let heir = join_as_task(&map, stale.flight()).expect("it is pending");
        call.lose();
        let waiter = join_as_task(&map, stale.flight()).expect("it is pending");
        let other = thread::spawn(move || {
            let new = heir.take_lead(0).expect("it was offered");
            assert!(new.complete(Arc::new(2), FOREVER, false));
        });
        drop(stale);
        other.join().expect("no panic");
        assert_eq!(waiter.outcome().map(|outcome| **outcome), Some(2));
        assert_eq!(map.stats().in_flight, 0);
    });
}
