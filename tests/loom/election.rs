//! Rule 1: of all callers one leads, and nobody who joins is forgotten.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use loom::thread;

use crate::support::{Served, join, lead, new_map, request};

#[test]
fn of_two_callers_one_leads_and_both_get_its_outcome() {
    loom::model(|| {
        let map = new_map();
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        let mine = request(&map, 1, FOREVER);
        let theirs = other.join().expect("no panic");
        let expected = if mine == Served::Led {
            (Served::Led, Served::Shared(1))
        } else {
            (Served::Shared(2), Served::Led)
        };
        assert_eq!((mine, theirs), expected);
        let stats = map.stats();
        assert_eq!((stats.calls, stats.in_flight, stats.retained), (1, 0, 1));
    });
}

#[test]
fn who_joins_while_the_leader_completes_gets_an_outcome() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, 0))
        };
        assert!(leads.complete(Arc::new(1), 0, false));
        // Its own if it came too late: nothing is retained.
        let theirs = other.join().expect("no panic");
        assert!(matches!(theirs, Served::Led | Served::Shared(1)), "{theirs:?}");
        assert_eq!((map.stats().in_flight, map.keys()), (0, 0));
    });
}

#[test]
fn who_joins_while_the_lead_is_dropped_leads() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        drop(leads);
        assert_eq!(other.join().expect("no panic"), Served::Led);
        let stats = map.stats();
        assert_eq!((stats.calls, stats.in_flight, stats.retained), (2, 0, 1));
    });
}

#[test]
fn of_two_waiters_one_inherits_the_lead_and_both_get_its_outcome() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let others = [2, 3].map(|own| {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, own, FOREVER))
        });
        drop(leads);
        let served = others.map(|other| other.join().expect("no panic"));
        let expected = [[Served::Led, Served::Shared(2)], [Served::Shared(3), Served::Led]];
        assert!(expected.contains(&served), "{served:?}");
    });
}

#[test]
fn an_offer_that_its_waiter_leaves_behind_goes_to_the_next() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let leaver = {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || drop(join(&map, &flight)))
        };
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        drop(leads);
        leaver.join().expect("no panic");
        assert_eq!(other.join().expect("no panic"), Served::Led);
        assert_eq!(map.stats().in_flight, 0);
    });
}
