//! Rule 3: a landed flight reaches every thread that waits for it, however the others leave.

use std::sync::Arc;

use loom::thread;

use crate::support::{Served, join, lead, new_map, sit};

#[test]
fn the_baton_reaches_both_waiters() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let waiters = [(); 2].map(|()| {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || join(&map, &flight).map(|place| sit(&place, 2, 0)))
        });
        assert!(leads.complete(Arc::new(1), 0, false));
        for waiter in waiters {
            let served = waiter.join().expect("no panic");
            assert!(matches!(served, None | Some(Served::Shared(1))), "{served:?}");
        }
    });
}

#[test]
fn the_baton_reaches_a_waiter_though_the_one_before_it_leaves() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let leaver = {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || drop(join(&map, &flight)))
        };
        let waiter = {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || join(&map, &flight).map(|place| sit(&place, 2, 0)))
        };
        assert!(leads.complete(Arc::new(1), 0, false));
        leaver.join().expect("no panic");
        let served = waiter.join().expect("no panic");
        assert!(matches!(served, None | Some(Served::Shared(1))), "{served:?}");
    });
}
