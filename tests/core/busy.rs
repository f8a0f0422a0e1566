//! A waiter that has something else to do before it waits: it has its seat, but the lead goes to others.

use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::family::Family;
use llm_batch_coalesce::flight::State;
use llm_batch_coalesce::lead::{Lead, Place};
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::waiter::{LoopId, NO_LOOP, Wakeup};

use crate::ops::{cancel, forget, lead_in_task, load, put};
use crate::support::{
    Clock, Outcome, Plain, SECOND, Task, Tasks, Turn, contains, flight, hit, in_time, join, join_as, lead,
    lead_on, read, turn,
};

const KEY: u64 = 7;

fn join_busy<const FAN: usize>(map: &Arc<Map<Plain<FAN>>>) -> Place<Plain<FAN>> {
    map.join_busy(&flight(map, KEY), NO_LOOP, Wakeup::this_thread()).expect("the flight is under way")
}

fn join_busy_as(map: &Arc<Map<Plain>>, loop_id: LoopId, task: Task) -> Place<Plain> {
    map.join_busy(&flight(map, KEY), loop_id, Wakeup::Task(task)).expect("the flight is under way")
}

fn standings<const N: usize, F: Family>(places: [&Place<F>; N]) -> [Standing; N] {
    places.map(Place::standing)
}

#[test]
fn a_busy_waiter_is_passed_over() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (busy, first, second) = (join_busy(&map), join(&map, KEY), join(&map, KEY));
    drop(leads);
    assert_eq!(
        standings([&busy, &first, &second]),
        [Standing::Waiting, Standing::Offered, Standing::Waiting]
    );
    assert!(busy.take_lead(0).is_none(), "it was not offered");
    let leads = first.take_lead(0).expect("it was offered");
    assert!(leads.complete(Outcome::new(1), 0, false));
    // It need not begin to wait to find the outcome.
    assert_eq!([read(&busy), read(&second)], [1, 1]);
    busy.begin_waiting();
    assert_eq!(read(&busy), 1);
}

#[test]
fn who_begins_to_wait_is_offered_the_lead_in_the_order_of_arrival() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (first, second, third) = (join_busy(&map), join(&map, KEY), join_busy(&map));
    first.begin_waiting();
    drop(leads);
    assert_eq!(
        standings([&first, &second, &third]),
        [Standing::Offered, Standing::Waiting, Standing::Waiting]
    );
    drop(first.take_lead(0).expect("it was offered"));
    assert_eq!(standings([&second, &third]), [Standing::Offered, Standing::Waiting]);
    third.begin_waiting();
    drop(second.take_lead(0).expect("it was offered"));
    assert_eq!(third.standing(), Standing::Offered);
}

#[test]
fn where_all_are_busy_the_flight_ends_and_they_ask_again() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let old = Arc::clone(leads.flight());
    let (thread, task) = (join_busy(&map), join_busy_as(&map, 1, tasks.task(1)));
    drop(leads);
    assert_eq!(standings([&thread, &task]), [Standing::Withdrawn; 2]);
    assert_eq!((old.state(), contains(&map, KEY), load(&map)), (State::Ended, false, (0, 0)));
    thread.begin_waiting();
    assert_eq!((thread.standing(), thread.wait(None)), (Standing::Withdrawn, Standing::Withdrawn));
    assert!(thread.outcome().is_none() && thread.take_lead(0).is_none());
    thread.ask_again();
    task.ask_again();
    let Turn::Lead(leads) = turn(&map, KEY) else { panic!("nobody else leads") };
    // The places of the old flight have nothing to do with the new one.
    drop((thread, task));
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    let stats = map.stats();
    assert_eq!((stats.calls, stats.joined, stats.cancelled, stats.handed_over), (2, 0, 0, 0));
}

#[test]
fn a_busy_task_is_woken_when_its_flight_ends_with_nobody_to_lead_it() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let places = [1, 2].map(|name| join_busy_as(&map, 3, tasks.task(name)));
    drop(leads);
    assert_eq!(tasks.woken(), [1, 2]);
    assert_eq!(places.each_ref().map(Place::standing), [Standing::Withdrawn; 2]);
}

#[test]
fn a_busy_task_is_woken_like_any_other_when_its_flight_lands_or_is_cancelled() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let place = join_busy_as(&map, 1, tasks.task(1));
    assert!(leads.complete(Outcome::new(1), 0, false));
    assert_eq!((tasks.woken(), read(&place)), (vec![1], 1));
    drop(place);

    let leads = lead(&map, KEY);
    let place = join_busy_as(&map, 1, tasks.task(2));
    assert!(cancel(&map, KEY));
    assert_eq!((tasks.woken(), place.standing()), (vec![2], Standing::Cancelled));
    place.begin_waiting();
    assert_eq!(place.standing(), Standing::Cancelled);
    drop(leads);
}

#[test]
fn an_offer_that_is_passed_on_passes_over_who_is_busy() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (first, busy, second) = (join(&map, KEY), join_busy(&map), join(&map, KEY));
    drop(leads);
    drop(first);
    assert_eq!(standings([&busy, &second]), [Standing::Waiting, Standing::Offered]);
    drop(second);
    assert_eq!((busy.standing(), contains(&map, KEY)), (Standing::Withdrawn, false));
}

#[test]
fn an_offer_that_is_withdrawn_from_a_task_is_for_nobody_who_is_busy() {
    in_time(|| {
        let clock = Clock::hold();
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let leads = lead(&map, KEY);
        let (stale, busy) = (join_as(&map, KEY, 1, tasks.task(1)), join_busy_as(&map, 2, tasks.task(2)));
        drop(leads);
        assert_eq!(
            (standings([&stale, &busy]), tasks.woken()),
            ([Standing::Offered, Standing::Waiting], vec![1])
        );
        clock.advance(SECOND);
        map.tick();
        assert_eq!(standings([&stale, &busy]), [Standing::Withdrawn; 2]);
        // It may be the sweeper that wakes it.
        assert_eq!((tasks.next(), contains(&map, KEY)), (2, false));
    });
}

#[test]
fn when_a_loop_is_lost_its_busy_waiters_are_cancelled_and_others_are_passed_over() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead_on(&map, KEY, 1);
    let near = join_busy_as(&map, 1, tasks.task(1));
    let far = join_busy_as(&map, 2, tasks.task(2));
    let heir = join_as(&map, KEY, 2, tasks.task(3));
    leads.lose_loop();
    assert_eq!(standings([&near, &far, &heir]), [Standing::Cancelled, Standing::Waiting, Standing::Offered]);
    assert_eq!(tasks.woken(), [1, 3]);
}

#[test]
fn a_call_goes_on_while_a_busy_waiter_wants_it() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_in_task(&map, KEY, 1, tasks.task(0), false);
    let busy = join_busy(&map);
    drop(led.caller);
    assert!(!led.call.cancelled());
    drop(busy);
    assert!(led.call.cancelled());
    assert_eq!((contains(&map, KEY), map.stats().cancelled), (false, 1));
}

#[test]
fn what_is_not_retained_stays_for_a_busy_waiter_and_goes_with_it() {
    let map = Map::<Plain>::new(Settings::default());
    let (dropped, drops) = mpsc::channel();
    let leads = lead(&map, KEY);
    let (busy, waiter) = (join_busy(&map), join(&map, KEY));
    assert!(leads.complete(Outcome::watched(1, &dropped), 0, false));
    assert_eq!(read(&waiter), 1);
    drop(waiter);
    assert!(drops.try_recv().is_err(), "the busy waiter has not read it yet");
    assert_eq!((read(&busy), hit(&map, KEY)), (1, None));
    drop(busy);
    assert_eq!(drops.try_recv(), Ok(1));
}

/// Threads that are parked when `end` ends their flight all wake, though others, who are busy, pass no baton on.
fn all_wake_though_some_are_busy<const FAN: usize>(
    end: impl FnOnce(&Arc<Map<Plain<FAN>>>, Lead<Plain<FAN>>) + Send + 'static,
    becomes: Standing,
) {
    in_time(move || {
        const PARKED: usize = 6;
        let map = Map::<Plain<FAN>>::new(Settings::default());
        let leads = lead(&map, KEY);
        let flight = Arc::clone(leads.flight());
        let joined = Barrier::new(2);
        thread::scope(|scope| {
            let (mut busy, mut parked) = (Vec::new(), Vec::new());
            for _ in 0..PARKED {
                // One that is busy before each that is parked, and so in every place of the chain.
                busy.push(join_busy(&map));
                parked.push(scope.spawn(|| {
                    let place = join(&map, KEY);
                    joined.wait();
                    let standing = place.wait(None);
                    place.pass_baton();
                    standing
                }));
                joined.wait();
            }
            assert_eq!(flight.waiters(), 2 * PARKED);
            end(&map, leads);
            for thread in parked {
                assert_eq!(thread.join().expect("no panic"), becomes);
            }
            assert!(busy.iter().all(|place| place.wait(None) == becomes));
        });
    });
}

#[test]
fn the_baton_of_a_landed_flight_is_not_given_to_who_is_busy() {
    all_wake_though_some_are_busy::<1>(
        |_, leads| assert!(leads.complete(Outcome::new(1), 0, false)),
        Standing::Landed,
    );
    all_wake_though_some_are_busy::<2>(
        |_, leads| assert!(leads.complete(Outcome::new(1), FOREVER, false)),
        Standing::Landed,
    );
}

#[test]
fn the_baton_of_a_cancelled_flight_is_not_given_to_who_is_busy() {
    all_wake_though_some_are_busy::<1>(|map, _leads| assert!(cancel(map, KEY)), Standing::Cancelled);
    all_wake_though_some_are_busy::<2>(|map, _leads| assert!(cancel(map, KEY)), Standing::Cancelled);
}

#[test]
fn a_busy_waiter_counts_as_what_becomes_of_it() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (served, leaves, times_out) = (join_busy(&map), join_busy(&map), join_busy(&map));
    drop(leaves);
    times_out.begin_waiting();
    times_out.count_timeout();
    drop(times_out);
    assert!(leads.complete(Outcome::new(1), 0, false));
    served.count_joined();
    drop(served);
    let stats = map.stats();
    assert_eq!((stats.calls, stats.joined, stats.timeouts, stats.cancelled), (1, 1, 1, 1));
}

#[test]
fn who_is_busy_counts_among_the_waiters_of_a_flight() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let _places = (join_busy(&map), join(&map, KEY));
    assert_eq!(leads.flight().waiters(), 2);
    let landed = Arc::clone(leads.flight());
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!(landed.report().0, 2);
    assert!(map.join_busy(&landed, NO_LOOP, Wakeup::this_thread()).is_none(), "it is over");
}

// Claims that come to no call.

#[test]
fn a_claim_that_is_refused_is_no_call_and_goes_to_who_waits() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    leads.refuse();
    assert_eq!(map.stats().calls, 0);
    drop(waiter.take_lead(0).expect("it was offered"));
    assert_eq!((map.stats().calls, load(&map), contains(&map, KEY)), (1, (0, 0), false));
}

#[test]
fn a_lead_that_a_store_serves_is_a_hit_and_no_call() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    leads.count_store_hit();
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!(hit(&map, KEY), Some(1));
    let stats = map.stats();
    assert_eq!((stats.calls, stats.hits, stats.store_hits, stats.store_errors), (0, 2, 1, 0));
    map.count_store_error(0);
    assert_eq!(map.stats().store_errors, 1);
    map.reset_stats();
    let stats = map.stats();
    assert_eq!((stats.calls, stats.hits, stats.store_hits, stats.store_errors), (0, 0, 0, 0));
}

#[test]
fn what_comes_for_a_key_that_was_forgotten_put_or_cancelled_would_not_be_retained() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    assert!(leads.is_owned());
    assert!(forget(&map, KEY));
    assert!(!leads.is_owned());
    let next = lead(&map, KEY);
    assert!(next.is_owned());
    put(&map, KEY, Outcome::new(1), FOREVER);
    assert!(!next.is_owned());
    let other = lead(&map, KEY + 1);
    assert!(cancel(&map, KEY + 1));
    assert!(!other.is_owned());
}
