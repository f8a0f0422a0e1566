//! To whom a lead is offered when some of the waiters cannot come for it.

use std::sync::Arc;

use llm_batch_coalesce::circle::BlockedLoop;
use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::State;
use llm_batch_coalesce::lead::Place;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::ops::load;
use crate::support::{Clock, Outcome, Plain, SECOND, Tasks, contains, eventually, hit, in_time, join};
use crate::support::{join_as, lead, read};

const KEY: u64 = 7;
/// Loops that no other test uses, since they are blocked for all.
const BLOCKED: usize = 1 << 40;
const ALSO_BLOCKED: usize = BLOCKED + 1;

fn standings<const N: usize>(places: [&Place<Plain>; N]) -> [Standing; N] {
    places.map(llm_batch_coalesce::lead::Place::standing)
}

#[test]
fn a_task_whose_loop_is_closed_is_passed_over_at_once() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let lost = join_as(&map, KEY, 1, tasks.lost(1));
    let (heir, waiter) = (join_as(&map, KEY, 2, tasks.task(2)), join(&map, KEY));
    drop(leads);
    assert_eq!(standings([&lost, &heir]), [Standing::Withdrawn, Standing::Offered]);
    assert!(lost.take_lead(0).is_none() && tasks.woken().contains(&2));
    let leads = heir.take_lead(0).expect("it was offered");
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY), load(&map)), (2, Some(2), (0, 1)));
}

#[test]
fn any_number_of_them_is_passed_over() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let lost: Vec<_> = (0..100).map(|name| join_as(&map, KEY, 1, tasks.lost(name))).collect();
    let (heir, waiter) = (join(&map, KEY), join_as(&map, KEY, 2, tasks.task(1000)));
    drop(leads);
    assert!(lost.iter().all(|place| place.standing() == Standing::Withdrawn));
    assert_eq!(standings([&heir, &waiter]), [Standing::Offered, Standing::Waiting]);
    assert!(heir.take_lead(0).expect("it was offered").complete(Outcome::new(2), 0, false));
    drop(lost);
    assert_eq!((read(&waiter), load(&map), heir.flight().report().0), (2, (0, 0), 1));
}

#[test]
fn a_flight_that_only_they_wait_for_ends() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let flight = Arc::clone(leads.flight());
    let lost = [1, 2, 3].map(|name| join_as(&map, KEY, 1, tasks.lost(name)));
    drop(leads);
    assert_eq!(standings(lost.each_ref()), [Standing::Withdrawn; 3]);
    assert_eq!((flight.state(), contains(&map, KEY), load(&map)), (State::Ended, false, (0, 0)));
    assert!(lead(&map, KEY).complete(Outcome::new(2), FOREVER, false));
    assert_eq!(hit(&map, KEY), Some(2));
}

#[test]
fn an_offer_that_a_waiter_passes_on_skips_them_too() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let first = join_as(&map, KEY, 2, tasks.task(1));
    let lost = [2, 3].map(|name| join_as(&map, KEY, 1, tasks.lost(name)));
    let heir = join_as(&map, KEY, 2, tasks.task(4));
    drop(leads);
    drop(first);
    assert_eq!(
        standings([&lost[0], &lost[1], &heir]),
        [Standing::Withdrawn, Standing::Withdrawn, Standing::Offered]
    );
}

#[test]
fn an_offer_that_is_withdrawn_after_a_second_skips_them_too() {
    in_time(|| {
        let clock = Clock::hold();
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let leads = lead(&map, KEY);
        let stuck = join_as(&map, KEY, 2, tasks.task(1));
        let lost = join_as(&map, KEY, 1, tasks.lost(2));
        let heir = join(&map, KEY);
        drop(leads);
        clock.advance(SECOND);
        eventually(|| {
            map.tick();
            heir.standing() == Standing::Offered
        });
        assert_eq!(standings([&stuck, &lost]), [Standing::Withdrawn; 2]);
        assert!(heir.take_lead(0).is_some());
    });
}

#[test]
fn a_waiter_whose_loop_is_blocked_comes_last() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let blocked = join_as(&map, KEY, BLOCKED, tasks.task(1));
    let (second, third) = (join_as(&map, KEY, 2, tasks.task(2)), join(&map, KEY));
    let _guard = BlockedLoop::begin(BLOCKED);
    let order = || standings([&blocked, &second, &third]);
    drop(leads);
    assert_eq!(order(), [Standing::Waiting, Standing::Offered, Standing::Waiting]);
    drop(second.take_lead(0).expect("it was offered"));
    assert_eq!(order(), [Standing::Waiting, Standing::Private, Standing::Offered]);
    drop(third.take_lead(0).expect("it was offered"));
    assert_eq!(order(), [Standing::Offered, Standing::Private, Standing::Private]);
    assert!(blocked.take_lead(0).expect("it was offered").complete(Outcome::new(4), FOREVER, false));
    assert_eq!((hit(&map, KEY), map.stats().calls, load(&map)), (Some(4), 4, (0, 1)));
}

#[test]
fn if_all_loops_are_blocked_the_first_waiter_is_offered_the_lead() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let places = [BLOCKED, ALSO_BLOCKED].map(|loop_id| join_as(&map, KEY, loop_id, tasks.task(1)));
    let _guards = [BLOCKED, ALSO_BLOCKED].map(BlockedLoop::begin);
    drop(leads);
    assert_eq!(standings(places.each_ref()), [Standing::Offered, Standing::Waiting]);
}

#[test]
fn a_loop_is_blocked_until_the_last_wait_on_it_has_ended() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let outer = BlockedLoop::begin(BLOCKED);
    let inner = BlockedLoop::begin(BLOCKED);
    let first_offered = |map: &Arc<Map<Plain>>| {
        let leads = lead(map, KEY);
        let places = [join_as(map, KEY, BLOCKED, tasks.task(1)), join_as(map, KEY, 2, tasks.task(2))];
        drop(leads);
        places[0].standing() == Standing::Offered
    };
    assert!(!first_offered(&map));
    drop(outer);
    assert!(!first_offered(&map));
    drop(inner);
    assert!(first_offered(&map));
    assert_eq!(load(&map), (0, 0));
}
