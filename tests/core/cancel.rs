//! Whoever waits for a key that is cancelled is told so; whoever leads it goes on alone.

use std::sync::{Arc, Barrier};
use std::thread;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::State;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::waiter::{NO_LOOP, Wakeup};

use crate::ops::{Led, cancel, forget, lead_in_task, load, put};
use crate::support::{
    Clock, Outcome, Plain, Tasks, contains, hit, in_time, join, join_as, lead, lead_on, read,
};

const KEY: u64 = 7;
/// The name of the task whose call it is.
const CALLER: u64 = 0;

fn led(map: &Arc<Map<Plain>>, tasks: &Tasks, finishes: bool) -> Led {
    lead_in_task(map, KEY, 1, tasks.task(CALLER), finishes)
}

#[test]
fn there_is_nothing_to_cancel_without_a_flight() {
    let map = Map::<Plain>::new(Settings::default());
    assert!(!cancel(&map, KEY), "nobody asked for it");
    drop(lead(&map, KEY));
    assert!(!cancel(&map, KEY), "its flight has ended");
}

#[test]
fn what_is_retained_stays() {
    let map = Map::<Plain>::new(Settings::default());
    assert!(lead(&map, KEY).complete(Outcome::new(1), FOREVER, false));
    put(&map, KEY + 1, Outcome::new(2), FOREVER);
    assert!(!cancel(&map, KEY) && !cancel(&map, KEY + 1));
    assert_eq!((hit(&map, KEY), hit(&map, KEY + 1), load(&map)), (Some(1), Some(2), (0, 2)));
}

/// All wait before the key is cancelled, so each of them has to be woken.
fn every_blocked_thread_is_woken<const FAN: usize>() {
    const WAITERS: usize = 16;
    in_time(|| {
        let map = Map::<Plain<FAN>>::new(Settings::default());
        let leads = lead(&map, KEY);
        let joined = Barrier::new(WAITERS + 1);
        thread::scope(|scope| {
            for _ in 0..WAITERS {
                scope.spawn(|| {
                    let place = join(&map, KEY);
                    joined.wait();
                    assert_eq!(place.wait(None), Standing::Cancelled);
                    assert!(place.outcome().is_none() && place.take_lead(0).is_none());
                    place.pass_baton();
                });
            }
            joined.wait();
            assert!(cancel(&map, KEY));
        });
        assert!(leads.complete(Outcome::new(1), FOREVER, false));
        let stats = map.stats();
        assert_eq!((stats.calls, stats.cancelled, stats.joined, load(&map)), (1, 16, 0, (0, 0)));
    });
}

#[test]
fn every_blocked_thread_is_woken_one_by_one() {
    every_blocked_thread_is_woken::<1>();
}

#[test]
fn every_blocked_thread_is_woken_by_two_each() {
    every_blocked_thread_is_woken::<2>();
}

#[test]
fn a_blocked_thread_is_woken_though_those_before_it_have_left() {
    in_time(|| {
        let map = Map::<Plain>::new(Settings::default());
        let leads = lead(&map, KEY);
        let hasty = [(); 3].map(|()| join(&map, KEY));
        let (map, joined) = (&map, &Barrier::new(2));
        thread::scope(|scope| {
            let patient = scope.spawn(move || {
                let place = join(map, KEY);
                joined.wait();
                place.wait(None)
            });
            joined.wait();
            assert!(cancel(map, KEY));
            // They have been told, and pass the baton when they go.
            drop(hasty);
            assert_eq!(patient.join().expect("no panic"), Standing::Cancelled);
        });
        drop(leads);
        assert_eq!(load(map), (0, 0));
    });
}

#[test]
fn every_task_is_woken_once_but_not_the_caller_whose_call_it_is() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = led(&map, &tasks, false);
    let waiters =
        [join_as(&map, KEY, 1, tasks.task(1)), join_as(&map, KEY, 2, tasks.task(2)), join(&map, KEY)];
    assert!(cancel(&map, KEY));
    assert_eq!(tasks.woken(), [1, 2]);
    assert_eq!(waiters.each_ref().map(llm_batch_coalesce::lead::Place::standing), [Standing::Cancelled; 3]);
    assert_eq!((led.caller.standing(), led.call.cancelled()), (Standing::Waiting, false));
    drop(waiters);

    assert!(led.lead.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((read(&led.caller), tasks.woken()), (1, vec![CALLER]));
    assert_eq!((hit(&map, KEY), map.keys(), load(&map)), (None, 0, (0, 0)));
    assert_eq!((map.stats().cancelled, led.call.cancelled()), (3, false));
}

#[test]
fn the_next_caller_leads_at_once_and_the_old_outcome_does_not_touch_its_own() {
    let map = Map::<Plain>::new(Settings::default());
    let old = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert!(cancel(&map, KEY));
    assert!(!contains(&map, KEY) && !cancel(&map, KEY));
    let new = lead(&map, KEY);
    let late = join(&map, KEY);
    assert!(old.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((late.standing(), hit(&map, KEY)), (Standing::Waiting, None));
    assert!(new.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&late), hit(&map, KEY), load(&map)), (2, Some(2), (0, 1)));
    assert_eq!((waiter.standing(), waiter.outcome().is_none()), (Standing::Cancelled, true));
}

#[test]
fn only_the_keys_present_flight_is_cancelled() {
    let map = Map::<Plain>::new(Settings::default());
    let forgotten = lead(&map, KEY);
    let early = join(&map, KEY);
    assert!(forget(&map, KEY));
    assert!(!cancel(&map, KEY), "nothing is there");
    let present = lead(&map, KEY);
    let late = join(&map, KEY);
    let other = lead(&map, KEY + 1);
    let elsewhere = join(&map, KEY + 1);
    assert!(cancel(&map, KEY));
    let standings = [&early, &late, &elsewhere].map(llm_batch_coalesce::lead::Place::standing);
    assert_eq!(standings, [Standing::Waiting, Standing::Cancelled, Standing::Waiting]);
    drop((forgotten, present, other));
    let standings = [&early, &late, &elsewhere].map(llm_batch_coalesce::lead::Place::standing);
    assert_eq!(standings, [Standing::Offered, Standing::Cancelled, Standing::Offered]);
}

#[test]
fn a_lead_that_is_given_up_afterwards_goes_to_nobody() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert!(cancel(&map, KEY));
    drop(leads);
    assert_eq!((waiter.standing(), load(&map)), (Standing::Cancelled, (0, 0)));
}

#[test]
fn who_was_offered_the_lead_is_cancelled_too() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let flight = Arc::clone(leads.flight());
    let (heir, other) = (join_as(&map, KEY, 1, tasks.task(1)), join_as(&map, KEY, 2, tasks.task(2)));
    drop(leads);
    assert_eq!((heir.standing(), tasks.woken()), (Standing::Offered, vec![1]));

    assert!(cancel(&map, KEY));
    assert_eq!([heir.standing(), other.standing()], [Standing::Cancelled; 2]);
    assert_eq!((tasks.woken(), heir.take_lead(0).is_none()), (vec![1, 2], true));
    // Nobody leads it any more, so it is over.
    assert_eq!((flight.state(), load(&map), map.flights().len()), (State::Ended, (0, 0), 0));
    assert!(map.join(&flight, NO_LOOP, Wakeup::this_thread()).is_none());
    drop((heir, other));
    assert_eq!((map.stats().calls, map.stats().cancelled), (1, 2));
    assert!(lead(&map, KEY).complete(Outcome::new(3), FOREVER, false));
    assert_eq!(hit(&map, KEY), Some(3));
}

#[test]
fn a_thread_that_was_offered_the_lead_and_has_not_come_for_it_is_cancelled_too() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let heir = join(&map, KEY);
    drop(leads);
    assert!(cancel(&map, KEY));
    assert_eq!((heir.standing(), heir.take_lead(0).is_none()), (Standing::Cancelled, true));
    assert_eq!(load(&map), (0, 0));
}

#[test]
fn who_has_taken_the_lead_goes_on() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (heir, waiter) = (join(&map, KEY), join(&map, KEY));
    drop(leads);
    let leads = heir.take_lead(0).expect("it was offered");
    assert!(cancel(&map, KEY));
    assert_eq!((heir.standing(), waiter.standing()), (Standing::Private, Standing::Cancelled));
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    drop((heir, waiter));
    let stats = map.stats();
    assert_eq!((stats.calls, stats.cancelled, hit(&map, KEY), load(&map)), (2, 1, None, (0, 0)));
}

#[test]
fn a_call_that_nobody_waits_for_any_more_is_cancelled() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let Led { lead: leads, caller, call } = led(&map, &tasks, false);
    let flight = Arc::clone(leads.flight());
    let waiter = join_as(&map, KEY, 2, tasks.task(1));
    drop(caller);
    assert!(!call.cancelled());
    assert!(cancel(&map, KEY));
    assert_eq!((call.cancelled(), waiter.standing()), (true, Standing::Cancelled));
    assert_eq!((flight.state(), load(&map), tasks.woken()), (State::Ended, (0, 0), vec![1]));
    assert!(!leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (None, (0, 0)));
}

#[test]
fn a_call_that_finishes_goes_on_though_nobody_waits_for_it() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let Led { lead: leads, caller, call } = led(&map, &tasks, true);
    let waiter = join_as(&map, KEY, 2, tasks.task(1));
    drop(caller);
    assert!(cancel(&map, KEY));
    assert_eq!((call.cancelled(), waiter.standing(), load(&map)), (false, Standing::Cancelled, (1, 0)));
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map), call.cancelled()), (None, (0, 0), false));
}

#[test]
fn the_caller_may_leave_afterwards_and_takes_its_call_along() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let Led { lead: leads, caller, call } = led(&map, &tasks, false);
    let waiter = join(&map, KEY);
    assert!(cancel(&map, KEY));
    // The newer flight of the key is none of its business.
    let new = lead_on(&map, KEY, 2);
    drop((waiter, caller));
    assert_eq!((call.cancelled(), load(&map), contains(&map, KEY)), (true, (1, 0), true));
    drop(leads);
    assert!(new.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (Some(2), (0, 1)));
}
