//! Rule 6: a lead that is given up reaches a waiter that can take it, and one only, though others withdraw it.

use std::sync::Arc;

use llm_batch_coalesce::clock::{self, FOREVER};
use llm_batch_coalesce::seat::Standing;
use loom::thread;

use crate::support::{
    SECOND, Served, Task, Turn, hit, hold_clock, join, join_as, join_as_task, lead, load, new_map, request,
    requests, turn,
};

/// Asks, and gives its own lead up: its call ends in a way that concerns nobody else. False if it was served.
fn ask_and_give_up(map: &Arc<llm_batch_coalesce::map::Map<crate::support::Plain>>) -> bool {
    loop {
        match turn(map) {
            Turn::Hit(_) => return false,
            Turn::Lead(lead) => {
                drop(lead);
                return true;
            }
            Turn::Join(flight) => {
                let Some(place) = join(map, &flight) else { continue };
                if place.wait(None) == Standing::Landed {
                    place.count_joined();
                    return false;
                }
                drop(place.take_lead(0).expect("nobody else was offered it"));
                return true;
            }
        }
    }
}

/// Nobody hangs, the one that is left leads, and each of the three counts once.
#[test]
fn a_lead_that_is_given_up_twice_reaches_the_last_waiter() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let quits = {
            let map = Arc::clone(&map);
            thread::spawn(move || ask_and_give_up(&map))
        };
        let stays = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        drop(leads);
        let gave_up = quits.join().expect("no panic");
        assert_eq!(stays.join().expect("no panic"), Served::Led);
        assert_eq!((map.stats().calls, requests(&map)), (2 + u64::from(gave_up), 3));
        assert_eq!((hit(&map), load(&map)), (Some(2), (0, 1, 1)));
    });
}

/// The sweeper withdraws an offer while its task comes for it: exactly one of the two waiters leads.
#[test]
fn an_offer_that_is_taken_while_it_is_withdrawn_goes_to_one() {
    let _clock = hold_clock();
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let [first, second] = [(); 2].map(|()| join_as_task(&map, leads.flight()).expect("it is pending"));
        drop(leads);
        clock::advance(SECOND);
        let sweeper = {
            let map = Arc::clone(&map);
            thread::spawn(move || map.tick())
        };
        let taken = first.take_lead(0);
        sweeper.join().expect("no panic");
        if let Some(leads) = taken {
            assert_eq!((first.standing(), second.standing()), (Standing::Private, Standing::Waiting));
            assert!(leads.complete(Arc::new(1), FOREVER, false));
            assert_eq!(second.outcome().map(|outcome| **outcome), Some(1));
            second.count_joined();
        } else {
            assert_eq!((first.standing(), second.standing()), (Standing::Withdrawn, Standing::Offered));
            let leads = second.take_lead(0).expect("it was offered");
            assert!(leads.complete(Arc::new(1), FOREVER, false));
            first.ask_again();
            assert_eq!(hit(&map), Some(1));
        }
        drop((first, second));
        assert_eq!((requests(&map), load(&map)), (3, (0, 1, 1)));
    });
}

/// The sweeper withdraws an offer while its task leaves: the next waiter gets it, once.
#[test]
fn an_offer_whose_task_leaves_while_it_is_withdrawn_goes_to_the_next() {
    let _clock = hold_clock();
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let [first, second, third] =
            [(); 3].map(|()| join_as_task(&map, leads.flight()).expect("it is pending"));
        drop(leads);
        clock::advance(SECOND);
        let sweeper = {
            let map = Arc::clone(&map);
            thread::spawn(move || map.tick())
        };
        drop(first);
        sweeper.join().expect("no panic");
        // Passed on just before, the new offer is not yet stale.
        assert_eq!((second.standing(), third.standing()), (Standing::Offered, Standing::Waiting));
        let leads = second.take_lead(0).expect("it was offered");
        assert!(leads.complete(Arc::new(1), 0, false));
        assert_eq!(third.outcome().map(|outcome| **outcome), Some(1));
        drop((second, third));
        assert_eq!(load(&map), (0, 0, 0));
    });
}

/// A task of a closed loop is collected while it is passed over: the next waiter gets the lead, once.
#[test]
fn an_offer_to_a_closed_loop_goes_on_though_its_task_leaves_at_that_moment() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let lost = join_as(&map, leads.flight(), Task::OfClosedLoop).expect("it is pending");
        let [heir, waiter] = [(); 2].map(|()| join_as_task(&map, leads.flight()).expect("it is pending"));
        let collector = thread::spawn(move || drop(lost));
        drop(leads);
        collector.join().expect("no panic");
        assert_eq!((heir.standing(), waiter.standing()), (Standing::Offered, Standing::Waiting));
        let leads = heir.take_lead(0).expect("it was offered");
        assert!(leads.complete(Arc::new(1), 0, false));
        assert_eq!(waiter.outcome().map(|outcome| **outcome), Some(1));
        drop((heir, waiter));
        assert_eq!((load(&map), requests(&map)), ((0, 0, 0), 4));
    });
}

/// Nobody is left to take it, or whoever joins meanwhile does. Nothing hangs, and the flight ends once.
#[test]
fn who_joins_while_the_only_waiter_is_passed_over_leads() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let lost = join_as(&map, leads.flight(), Task::OfClosedLoop).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        drop(leads);
        assert_eq!(other.join().expect("no panic"), Served::Led);
        assert_eq!((lost.standing(), hit(&map)), (Standing::Withdrawn, Some(2)));
        assert_eq!(load(&map), (0, 1, 1));
    });
}
