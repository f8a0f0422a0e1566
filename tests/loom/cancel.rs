//! Rule 8: every waiter is served or cancelled, never both; nothing of what was cancelled is retained.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::seat::Standing;
use loom::thread;

use crate::support::{
    FakeCall, LOOP, Served, cancel, hit, join, join_as_task, lead, lead_on, load, new_map, request, requests,
    sit,
};

/// Either it has landed and stays, or its key is cancelled and nothing is retained. Its waiter is served or cancelled.
#[test]
fn a_flight_that_lands_while_it_is_cancelled_is_retained_or_cancelled() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let place = join(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || cancel(&map))
        };
        assert!(leads.complete(Arc::new(1), FOREVER, false), "its leader is not concerned");
        let served = sit(&place, 2, 0);
        let cancelled = other.join().expect("no panic");
        drop(place);
        assert_eq!(requests(&map), 2);
        if cancelled {
            assert!(matches!(served, Served::Cancelled | Served::Shared(1)), "{served:?}");
            assert_eq!((hit(&map), load(&map)), (None, (0, 0, 0)));
        } else {
            assert_eq!((served, hit(&map), load(&map)), (Served::Shared(1), Some(1), (0, 1, 1)));
        }
    });
}

/// Nobody hangs. Whoever asks is cancelled, has come too late for that and is served, or leads anew.
#[test]
fn who_joins_while_the_key_is_cancelled_is_cancelled_served_or_leads() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let asks = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        assert!(cancel(&map));
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        let theirs = asks.join().expect("no panic");
        assert_eq!(requests(&map), 2, "{theirs:?}");
        match theirs {
            Served::Led => assert_eq!((load(&map), hit(&map)), ((0, 1, 1), Some(2))),
            theirs => {
                assert!(matches!(theirs, Served::Cancelled | Served::Shared(1)), "{theirs:?}");
                assert_eq!((load(&map), hit(&map)), ((0, 0, 0), None));
            }
        }
    });
}

/// The key is free before its waiters wake: none of them finds what was cancelled again.
#[test]
fn who_was_cancelled_and_asks_again_leads() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let asks = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                let first = request(&map, 2, 0);
                (first == Served::Cancelled).then(|| request(&map, 3, 0))
            })
        };
        assert!(cancel(&map));
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        let again = asks.join().expect("no panic");
        assert!(matches!(again, None | Some(Served::Led)), "{again:?}");
        assert_eq!((hit(&map), load(&map)), (None, (0, 0, 0)));
    });
}

/// The baton reaches both, whichever of them is told first.
#[test]
fn all_who_wait_are_cancelled() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let waiters = [(); 2].map(|()| {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || join(&map, &flight).map(|place| sit(&place, 2, 0)))
        });
        assert!(cancel(&map));
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        for waiter in waiters {
            let served = waiter.join().expect("no panic");
            let expected = matches!(served, None | Some(Served::Cancelled | Served::Shared(1)));
            assert!(expected, "{served:?}");
        }
        assert_eq!((hit(&map), load(&map)), (None, (0, 0, 0)));
    });
}

/// The heir leads or is cancelled, and the flight ends once.
#[test]
fn an_offer_that_is_taken_while_the_key_is_cancelled_is_a_lead_or_none() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let heir = join_as_task(&map, leads.flight()).expect("it is pending");
        let waiter = join_as_task(&map, leads.flight()).expect("it is pending");
        drop(leads);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || cancel(&map))
        };
        let taken = heir.take_lead(0);
        assert!(other.join().expect("no panic"), "it was under way all the time");
        assert_eq!(waiter.standing(), Standing::Cancelled);
        if let Some(leads) = taken {
            assert_eq!(heir.standing(), Standing::Private);
            assert!(leads.complete(Arc::new(2), FOREVER, false));
        } else {
            assert_eq!(heir.standing(), Standing::Cancelled);
        }
        drop((heir, waiter));
        assert_eq!((hit(&map), load(&map), requests(&map)), (None, (0, 0, 0), 3));
    });
}

/// The waiter is cancelled or leads; the flight ends once, and no offer is left behind.
#[test]
fn a_lead_that_is_given_up_while_the_key_is_cancelled_goes_to_the_waiter_or_to_nobody() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let place = join(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || cancel(&map))
        };
        drop(leads);
        let served = sit(&place, 2, 0);
        let cancelled = other.join().expect("no panic");
        assert!(matches!(served, Served::Led | Served::Cancelled), "{served:?}");
        assert!(cancelled || served == Served::Led);
        drop(place);
        assert_eq!((hit(&map), load(&map), requests(&map)), (None, (0, 0, 0), 2));
    });
}

/// One cancels the waiters, the other is the last to leave: the call is cancelled, and once (see `FakeCall`).
#[test]
fn a_call_whose_caller_leaves_while_the_key_is_cancelled_is_cancelled_once() {
    loom::model(|| {
        let map = new_map();
        let leads = lead_on(&map, LOOP);
        let caller = leads.seat_caller(LOOP, false);
        let call = Arc::new(FakeCall::default());
        leads.led_by(Arc::clone(&call));
        let waiter = join_as_task(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || cancel(&map))
        };
        drop(caller);
        assert!(other.join().expect("no panic"));
        assert_eq!((call.cancelled(), waiter.standing()), (true, Standing::Cancelled));
        assert!(!leads.complete(Arc::new(1), FOREVER, false));
        drop(waiter);
        assert_eq!((hit(&map), load(&map), requests(&map)), (None, (0, 0, 0), 2));
    });
}

/// A waiter that leaves at that moment counts once, whether it was told or not, and leaves nothing behind.
#[test]
fn a_waiter_may_leave_while_the_key_is_cancelled() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let place = join_as_task(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || cancel(&map))
        };
        drop(place);
        assert!(other.join().expect("no panic"));
        assert_eq!((leads.flight().waiters(), map.stats().cancelled), (0, 1));
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        assert_eq!((hit(&map), load(&map), requests(&map)), (None, (0, 0, 0), 2));
    });
}
