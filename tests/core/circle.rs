//! Of flights that wait for each other in a circle the one that would close it is told so.

use std::sync::{Arc, Barrier};
use std::thread;

use llm_batch_coalesce::circle::{BlockedLoop, Circle, Nested, Source};
use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::family::Family;
use llm_batch_coalesce::lead::Lead;
use llm_batch_coalesce::map::{Map, Settings};

use crate::ops::lead_in_task;
use crate::support::{Outcome, Plain, Tasks, in_time, join, lead, lead_on};

/// Loops that no other test uses.
const LOOP: usize = 1 << 41;

fn call<F: Family>(lead: &Lead<F>) -> Source {
    Source::Call(Arc::as_ptr(lead.flight()).addr(), lead.epoch())
}

/// What `waiting` begins when it asks for the key of `wanted`.
fn wait<F: Family, G: Family>(waiting: &Lead<F>, wanted: &Lead<G>) -> Result<Nested, Circle> {
    Nested::begin(vec![call(waiting)], wanted.flight())
}

fn leads(map: &Arc<Map<Plain>>, count: u64) -> Vec<Lead<Plain>> {
    (0..count).map(|key| lead(map, key)).collect()
}

#[test]
fn two_flights_do_not_wait_for_each_other() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = leads(&map, 2);
    let first = wait(&leads[0], &leads[1]).expect("the other one does not wait");
    assert_eq!(wait(&leads[1], &leads[0]).expect_err("they would wait for each other"), Circle);
    // It may try again as often as it likes, and gets through when the other one has been served.
    assert!(wait(&leads[1], &leads[0]).is_err());
    drop(first);
    assert!(wait(&leads[1], &leads[0]).is_ok());
}

#[test]
fn a_flight_does_not_wait_for_itself() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = leads(&map, 1);
    assert!(wait(&leads[0], &leads[0]).is_err());
}

#[test]
fn in_a_ring_it_is_the_last_one_that_finds_the_circle() {
    let map = Map::<Plain>::new(Settings::default());
    for length in 3..=8 {
        let leads = leads(&map, length as u64);
        for last in 0..length {
            // All but one wait, in an order of their own.
            let order = (1..length).map(|step| (last + step * (length - 1)) % length);
            let waits: Vec<_> = order
                .map(|place| wait(&leads[place], &leads[(place + 1) % length]).expect("it is open"))
                .collect();
            let next = (last + 1) % length;
            assert!(wait(&leads[last], &leads[next]).is_err(), "{last} of {length}");
            drop(waits);
            assert!(wait(&leads[last], &leads[next]).is_ok(), "{last} of {length}");
        }
    }
}

#[test]
fn a_circle_through_maps_of_several_kinds_is_found() {
    let (map, other) = (Map::<Plain>::new(Settings::default()), Map::<Plain<2>>::new(Settings::default()));
    let (one, two) = (lead(&map, 1), lead(&other, 1));
    let _first = wait(&one, &two).expect("the other one does not wait");
    assert!(wait(&two, &one).is_err());
}

#[test]
fn two_ways_to_the_same_flight_are_no_circle() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = leads(&map, 4);
    let ways = [(0, 1), (0, 2), (1, 3), (2, 3)];
    let waits = ways.map(|(from, to)| wait(&leads[from], &leads[to]).expect("it is no circle"));
    // But from its end back to its start.
    assert!(wait(&leads[3], &leads[0]).is_err());
    let [to_left, to_right, from_left, from_right] = waits;
    drop(to_left);
    assert!(wait(&leads[3], &leads[0]).is_err(), "the right way is left");
    drop(from_right);
    assert!(wait(&leads[3], &leads[0]).is_ok(), "there is half of each way");
    drop((to_right, from_left));
}

#[test]
fn several_waits_for_one_flight_end_one_by_one() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = leads(&map, 2);
    let waits = [(); 2].map(|()| wait(&leads[0], &leads[1]).expect("no circle"));
    let [first, second] = waits;
    drop(first);
    assert!(wait(&leads[1], &leads[0]).is_err());
    drop(second);
    assert!(wait(&leads[1], &leads[0]).is_ok());
}

#[test]
fn a_caller_waits_with_all_the_calls_that_it_is_inside_of() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = leads(&map, 3);
    let inside = vec![call(&leads[0]), call(&leads[1])];
    let nested = Nested::begin(inside, leads[2].flight()).expect("no circle");
    for outer in &leads[..2] {
        assert!(wait(&leads[2], outer).is_err());
    }
    drop(nested);
    for outer in &leads[..2] {
        assert!(wait(&leads[2], outer).is_ok());
    }
}

#[test]
fn a_lead_that_is_over_is_part_of_no_circle() {
    let map = Map::<Plain>::new(Settings::default());
    let other = lead(&map, 1);
    let stale = lead(&map, 2);
    let heir = join(&map, 2);
    let flight = Arc::clone(stale.flight());
    let (inside, _waits) = (call(&stale), wait(&stale, &other).expect("no circle"));
    drop(stale);
    let new = heir.take_lead(0).expect("it was offered");
    // What still waits inside of the first attempt does not hold up the second one.
    let waits = wait(&other, &new).expect("no circle");
    assert!(Nested::begin(vec![inside], &flight).is_ok(), "a call of the past waits for its successor");
    assert!(wait(&new, &other).is_err(), "the second attempt itself does");
    drop(waits);
    assert!(wait(&new, &other).is_ok());
}

#[test]
fn a_flight_that_has_landed_depends_on_nothing() {
    let map = Map::<Plain>::new(Settings::default());
    let (one, two) = (lead(&map, 1), lead(&map, 2));
    let (source, flight) = (call(&one), Arc::clone(one.flight()));
    let _waits = wait(&one, &two).expect("no circle");
    assert!(one.complete(Outcome::new(1), FOREVER, false));
    assert!(wait(&two, &lead(&map, 3)).is_ok());
    assert!(Nested::begin(vec![call(&two)], &flight).is_ok());
    assert!(Nested::begin(vec![source], &flight).is_ok());
}

#[test]
fn a_flight_that_is_led_on_a_blocked_loop_waits_for_what_blocks_it() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let on_loop = lead_in_task(&map, 1, LOOP, tasks.task(0), false);
    let (in_thread, other) = (lead(&map, 2), lead(&map, 3));
    // The loop's thread waits for the second flight, though not from within the first one.
    let blocked = BlockedLoop::begin(LOOP);
    let nested = Nested::begin(vec![Source::Loop(LOOP)], in_thread.flight()).expect("no circle");
    assert!(wait(&in_thread, &on_loop.lead).is_err());
    assert!(wait(&other, &on_loop.lead).is_ok(), "the second flight will end");
    drop((nested, blocked));
    assert!(wait(&in_thread, &on_loop.lead).is_ok());
}

#[test]
fn a_blocked_loop_does_not_wait_for_a_flight_that_is_led_on_it() {
    let map = Map::<Plain>::new(Settings::default());
    let on_loop = lead_on(&map, 1, LOOP + 1);
    let elsewhere = lead_on(&map, 2, LOOP + 2);
    let inside = || vec![Source::Loop(LOOP + 1)];
    assert!(Nested::begin(inside(), on_loop.flight()).is_err());
    // Nor for one that depends on it by way of another loop.
    let _nested = Nested::begin(vec![Source::Loop(LOOP + 2)], on_loop.flight()).expect("no circle");
    assert!(Nested::begin(inside(), elsewhere.flight()).is_err());
    assert!(Nested::begin(vec![Source::Loop(LOOP + 3)], elsewhere.flight()).is_ok());
}

/// Threads that close a ring all at once: exactly one of them is told, however they come.
#[test]
fn of_threads_that_close_a_ring_at_once_exactly_one_is_told() {
    const LENGTH: usize = 4;
    in_time(|| {
        let map = Map::<Plain>::new(Settings::default());
        let leads = leads(&map, LENGTH as u64);
        let barrier = Barrier::new(LENGTH);
        let told: usize = thread::scope(|scope| {
            let closes = |place: usize| {
                let (leads, barrier) = (&leads, &barrier);
                scope.spawn(move || {
                    let mut told = 0;
                    for _ in 0..300 {
                        barrier.wait();
                        let nested = wait(&leads[place], &leads[(place + 1) % LENGTH]);
                        told += usize::from(nested.is_err());
                        // Nobody lets go before all have tried.
                        barrier.wait();
                        drop(nested);
                    }
                    told
                })
            };
            let threads: Vec<_> = (0..LENGTH).map(closes).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        assert_eq!(told, 300);
    });
}
