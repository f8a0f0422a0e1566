//! A lead that ends without an outcome goes to the waiters, first come first.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::thread;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::State;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::support::{Outcome, Plain, contains, hit, in_time, join, lead, read};

const KEY: u64 = 7;

#[test]
fn a_dropped_lead_goes_to_the_first_waiter() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let waiters = [(); 3].map(|()| join(&map, KEY));
    let standings = || waiters.each_ref().map(llm_batch_coalesce::lead::Place::standing);
    assert!(waiters[0].take_lead(0).is_none(), "a lead that was not offered");

    drop(leads);
    assert_eq!(standings(), [Standing::Offered, Standing::Waiting, Standing::Waiting]);
    assert!(waiters[1].take_lead(0).is_none(), "a lead that was offered to another");

    drop(waiters[0].take_lead(0).expect("it was offered"));
    assert!(waiters[0].take_lead(0).is_none(), "a lead that was taken before");
    assert_eq!(standings(), [Standing::Private, Standing::Offered, Standing::Waiting]);

    let lead = waiters[1].take_lead(0).expect("it was offered");
    assert!(lead.complete(Outcome::new(2), FOREVER, false));
    assert_eq!(read(&waiters[2]), 2);
    assert_eq!(hit(&map, KEY), Some(2));
    assert_eq!((map.stats().calls, map.stats().in_flight), (3, 0));
}

#[test]
fn a_waiter_that_leaves_with_the_offer_passes_it_on() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (first, second) = (join(&map, KEY), join(&map, KEY));
    drop(leads);
    drop(first);
    assert_eq!(second.standing(), Standing::Offered);
    drop(second);
    assert!(!contains(&map, KEY));
    assert_eq!((map.stats().calls, map.stats().in_flight), (1, 0));
}

#[test]
fn a_dropped_lead_without_waiters_ends_the_flight() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let flight = leads.flight().clone();
    drop(join(&map, KEY));
    drop(leads);
    assert_eq!((flight.state(), contains(&map, KEY), map.keys()), (State::Ended, false, 0));
    assert!(lead(&map, KEY).complete(Outcome::new(2), FOREVER, false));
    assert_eq!(hit(&map, KEY), Some(2));
}

#[test]
fn a_leader_that_panics_hands_over() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let _leads = leads;
        std::panic::resume_unwind(Box::new("the leader's callable has failed"));
    }));
    assert!(panic.is_err());
    assert_eq!(waiter.standing(), Standing::Offered);
}

#[test]
fn a_blocked_thread_wakes_up_to_lead() {
    in_time(|| {
        let map = Map::<Plain>::new(Settings::default());
        let leads = lead(&map, KEY);
        let joined = Barrier::new(3);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let place = join(&map, KEY);
                    joined.wait();
                    if place.wait(None) == Standing::Offered {
                        let lead = place.take_lead(0).expect("it was offered");
                        assert!(lead.complete(Outcome::new(2), 0, false));
                    } else {
                        assert_eq!(read(&place), 2);
                    }
                });
            }
            joined.wait();
            drop(leads);
        });
        assert_eq!((map.stats().calls, map.stats().in_flight), (2, 0));
    });
}

#[test]
fn an_abandoned_call_counts_as_an_error_only_if_it_failed() {
    let map = Map::<Plain>::new(Settings::default());
    assert!(!lead(&map, KEY).abandon(false), "no caller had a seat");
    assert_eq!(map.stats().errors, 0);
    assert!(!lead(&map, KEY).abandon(true), "no caller had a seat");
    assert_eq!(map.stats().errors, 1);
    assert!(lead(&map, KEY).complete(Outcome::new(1), 0, true));
    assert_eq!(map.stats().errors, 2);
}
