//! Rule 12: a waiter that is busy at first is served, offered the lead or told to ask again, whenever it begins to wait.

use std::sync::Arc;

use llm_batch_coalesce::clock::{FOREVER, Nanos};
use llm_batch_coalesce::flight::Flight;
use llm_batch_coalesce::map::Map;
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::waiter::{NO_LOOP, Wakeup};
use loom::thread::{self, JoinHandle};

use crate::support::{Plain, Served, hit, join, lead, load, new_map, request, requests, sit};

/// Has something else to do first, and then waits.
fn ask_busy(map: &Arc<Map<Plain>>, flight: &Arc<Flight<Plain>>, own: u64, ttl: Nanos) -> Served {
    let Some(place) = map.join_busy(flight, NO_LOOP, Wakeup::this_thread()) else {
        return request(map, own, ttl);
    };
    place.begin_waiting();
    if place.wait(None) != Standing::Withdrawn {
        return sit(&place, own, ttl);
    }
    place.ask_again();
    drop(place);
    request(map, own, ttl)
}

fn spawn_busy(
    map: &Arc<Map<Plain>>,
    flight: &Arc<Flight<Plain>>,
    own: u64,
    ttl: Nanos,
) -> JoinHandle<Served> {
    let (map, flight) = (Arc::clone(map), Arc::clone(flight));
    thread::spawn(move || ask_busy(&map, &flight, own, ttl))
}

/// Nobody hangs, the one of two who is left leads once, and each request counts once.
#[test]
fn who_begins_to_wait_while_the_lead_is_given_up_leads_or_is_served() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let busy = spawn_busy(&map, leads.flight(), 2, FOREVER);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 3, FOREVER))
        };
        drop(leads);
        let served = (busy.join().expect("no panic"), other.join().expect("no panic"));
        assert!(
            matches!(served, (Served::Led, Served::Shared(2)) | (Served::Shared(3), Served::Led)),
            "{served:?}"
        );
        assert_eq!((map.stats().calls, requests(&map), load(&map)), (2, 3, (0, 1, 1)));
        assert!(hit(&map).is_some());
    });
}

/// Of two that are busy the flight may end under both: neither hangs, and one leads.
#[test]
fn two_that_are_busy_while_the_lead_is_given_up_share_one_call() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let busy = [2, 3].map(|own| spawn_busy(&map, leads.flight(), own, FOREVER));
        drop(leads);
        let served = busy.map(|thread| thread.join().expect("no panic"));
        assert!(
            matches!(served, [Served::Led, Served::Shared(2)] | [Served::Shared(3), Served::Led]),
            "{served:?}"
        );
        assert_eq!((map.stats().calls, requests(&map), load(&map)), (2, 3, (0, 1, 1)));
    });
}

/// The baton of a landed flight reaches who is parked though another begins to wait at that moment, and both are served.
#[test]
fn who_begins_to_wait_while_its_flight_lands_does_not_keep_the_baton() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let busy = spawn_busy(&map, leads.flight(), 2, 0);
        let parked = {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || join(&map, &flight).map(|place| sit(&place, 3, 0)))
        };
        assert!(leads.complete(Arc::new(1), 0, false));
        let (busy, parked) = (busy.join().expect("no panic"), parked.join().expect("no panic"));
        // Whoever came too late for it leads, or joins who does.
        assert!(matches!(busy, Served::Led | Served::Shared(1)), "{busy:?}");
        assert!(matches!(parked, None | Some(Served::Shared(1))), "{parked:?}");
        assert_eq!(load(&map), (0, 0, 0));
    });
}
