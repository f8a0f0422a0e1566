//! Callers that are tasks of event loops. The loops are numbers, and a task is woken by a message.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::expiry;
use llm_batch_coalesce::flight::{Flight, State};
use llm_batch_coalesce::lead::{Lead, Place};
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::waiter::{NO_LOOP, Wakeup};

use crate::support::{
    Call, Clock, Outcome, Plain, SECOND, Tasks, contains, eventually, hit, in_time, join, join_as, lead,
    lead_on, read,
};

const KEY: u64 = 7;
/// The name of the task whose call it is.
const CALLER: u64 = 0;

/// A call that runs in a task of loop 1, and the caller that waits for it.
struct Led {
    lead: Lead<Plain>,
    caller: Place<Plain>,
    call: Arc<Call>,
}

fn lead_on_loop_1(map: &Arc<Map<Plain>>, tasks: &Tasks) -> Led {
    let lead = lead_on(map, KEY, 1);
    let caller = lead.seat_caller(1, false);
    let call = Call::new();
    lead.led_by(Arc::clone(&call));
    assert!(caller.wait_with(tasks.task(CALLER)));
    Led { lead, caller, call }
}

fn standings<const N: usize>(places: [&Place<Plain>; N]) -> [Standing; N] {
    places.map(llm_batch_coalesce::lead::Place::standing)
}

#[test]
fn completion_wakes_every_task_once() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    let near = join_as(&map, KEY, 1, tasks.task(1));
    let far = join_as(&map, KEY, 2, tasks.task(2));
    let gone = join_as(&map, KEY, 2, tasks.task(3));
    drop(gone);
    assert!(tasks.woken().is_empty());
    assert!(led.lead.complete(Outcome::new(1), 0, false));
    assert_eq!(tasks.woken(), [CALLER, 1, 2]);
    assert_eq!([&led.caller, &near, &far].map(read), [1; 3]);
    assert!(!led.call.cancelled());
}

#[test]
fn a_caller_whose_call_has_ended_has_nothing_to_wait_for() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead_on(&map, KEY, 1);
    let caller = leads.seat_caller(1, false);
    assert!(leads.complete(Outcome::new(1), 0, false));
    assert!(!caller.wait_with(tasks.task(CALLER)));
    assert_eq!((read(&caller), tasks.woken()), (1, vec![]));

    let leads = lead_on(&map, KEY, 1);
    let caller = leads.seat_caller(1, false);
    assert!(leads.abandon(false), "its caller has a seat");
    assert!(!caller.wait_with(tasks.task(CALLER)));
    assert_eq!((caller.standing(), tasks.woken()), (Standing::Private, vec![]));
}

#[test]
fn a_call_whose_caller_is_gone_cannot_be_abandoned_to_it() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    let heir = join(&map, KEY);
    drop(led.caller);
    assert!(!led.lead.abandon(true));
    assert_eq!((heir.standing(), map.stats().errors), (Standing::Offered, 1));
}

#[test]
fn a_task_that_takes_the_lead_gets_a_callers_seat() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    let heir = join_as(&map, KEY, 2, tasks.task(1));
    let waiter = join_as(&map, KEY, 1, tasks.task(2));
    assert!(led.lead.abandon(false));
    assert_eq!(tasks.woken(), [CALLER, 1]);
    assert_eq!(led.caller.standing(), Standing::Private);

    let leads = heir.take_lead(0).expect("it was offered");
    let call = Call::new();
    let caller = leads.seat_caller(2, false);
    leads.led_by(Arc::clone(&call));
    drop(heir);
    assert!(caller.wait_with(tasks.task(1)));
    assert!(leads.complete(Outcome::new(2), 0, false));
    assert_eq!((tasks.woken(), read(&caller), read(&waiter)), (vec![1, 2], 2, 2));
    assert_eq!((call.cancelled(), led.call.cancelled(), map.stats().calls), (false, false, 2));
}

#[test]
fn the_last_to_leave_cancels_the_call() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    let flight: Arc<Flight<Plain>> = Arc::clone(led.lead.flight());
    let waiter = join_as(&map, KEY, 2, tasks.task(1));
    drop(led.caller);
    assert!(!led.call.cancelled());
    drop(waiter);
    assert!(led.call.cancelled());

    // From now on nobody can join, whatever the call makes of it.
    assert!(map.join(&flight, NO_LOOP, Wakeup::this_thread()).is_none());
    assert_eq!((flight.state(), contains(&map, KEY), map.stats().in_flight), (State::Ended, false, 0));
    let next = lead(&map, KEY);
    assert!(!led.lead.complete(Outcome::new(1), FOREVER, false));
    assert_eq!(hit(&map, KEY), None);
    assert!(next.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((hit(&map, KEY), map.stats().in_flight, map.stats().retained), (Some(2), 0, 1));
}

#[test]
fn a_call_without_a_task_goes_on_without_callers() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    drop(join(&map, KEY));
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!(hit(&map, KEY), Some(1));
}

#[test]
fn a_lost_loop_takes_its_own_waiters_along() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    let (near, heir) = (join_as(&map, KEY, 1, tasks.task(1)), join_as(&map, KEY, 2, tasks.task(2)));
    let (nearer, far) = (join_as(&map, KEY, 1, tasks.task(3)), join_as(&map, KEY, 3, tasks.task(4)));
    led.lead.lose_loop();
    assert_eq!(tasks.woken(), [CALLER, 1, 2, 3]);
    assert_eq!(standings([&led.caller, &near, &nearer]), [Standing::Cancelled; 3]);
    assert_eq!(standings([&heir, &far]), [Standing::Offered, Standing::Waiting]);
    // Those that were cancelled may go whenever they like.
    drop((led.caller, near, nearer));
    let leads = heir.take_lead(0).expect("it was offered");
    assert!(leads.complete(Outcome::new(2), 0, false));
    assert_eq!((read(&far), tasks.woken()), (2, vec![4]));
    assert!(!led.call.cancelled());
}

#[test]
fn a_lost_loop_without_waiters_elsewhere_ends_the_flight() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    let near = join_as(&map, KEY, 1, tasks.task(1));
    led.lead.lose_loop();
    assert_eq!(standings([&led.caller, &near]), [Standing::Cancelled; 2]);
    assert_eq!((contains(&map, KEY), map.stats().in_flight), (false, 0));
}

#[test]
fn who_joins_on_the_leaders_loop_does_not_ask_whether_it_runs() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    led.call.lose();
    let near = join_as(&map, KEY, 1, tasks.task(1));
    assert_eq!(standings([&led.caller, &near]), [Standing::Waiting; 2]);
}

#[test]
fn who_joins_from_elsewhere_finds_out_that_a_call_is_lost() {
    in_time(|| {
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let led = lead_on_loop_1(&map, &tasks);
        let (near, heir) = (join_as(&map, KEY, 1, tasks.task(1)), join(&map, KEY));
        led.call.lose();
        let far = join_as(&map, KEY, 2, tasks.task(2));
        assert_eq!(standings([&led.caller, &near]), [Standing::Cancelled; 2]);
        assert_eq!(standings([&heir, &far]), [Standing::Offered, Standing::Waiting]);
        assert_eq!([tasks.next(), tasks.next()], [CALLER, 1]);
    });
}

#[test]
fn who_alone_joins_a_lost_call_leads() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    led.call.lose();
    let place = map.join(led.lead.flight(), NO_LOOP, Wakeup::this_thread());
    let leads = match &place {
        Some(place) => place.take_lead(0).expect("nobody else is there"),
        None => lead(&map, KEY),
    };
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    assert!(!led.lead.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((led.caller.standing(), hit(&map, KEY)), (Standing::Cancelled, Some(2)));
    assert_eq!(map.stats().in_flight, 0);
}

#[test]
fn the_sweeper_finds_out_that_a_call_is_lost() {
    in_time(|| {
        let _clock = Clock::hold();
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let led = lead_on_loop_1(&map, &tasks);
        let heir = join_as(&map, KEY, 2, tasks.task(1));
        led.call.lose();
        expiry::wake_now();
        let mut woken = [tasks.next(), tasks.next()];
        woken.sort_unstable();
        assert_eq!(woken, [CALLER, 1]);
        assert_eq!(standings([&led.caller, &heir]), [Standing::Cancelled, Standing::Offered]);
    });
}

/// The call's task is known only once it has started, and by then others may have joined.
#[test]
fn the_sweeper_looks_after_who_joined_before_the_call_was_known() {
    in_time(|| {
        let map = Map::<Plain>::new(Settings::default());
        let leads = lead_on(&map, KEY, 1);
        let heir = join(&map, KEY);
        let caller = leads.seat_caller(1, false);
        let call = Call::new();
        leads.led_by(Arc::clone(&call));
        call.lose();
        eventually(|| {
            map.tick();
            standings([&caller, &heir]) == [Standing::Cancelled, Standing::Offered]
        });
    });
}

#[test]
fn the_sweeper_does_not_look_after_what_needs_no_look() {
    in_time(|| {
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let led = lead_on_loop_1(&map, &tasks);
        let near = join_as(&map, KEY, 1, tasks.task(1));
        assert!(!map.tick(), "all are on the leader's loop");
        let far = join(&map, KEY);
        eventually(|| map.tick());
        drop(far);
        eventually(|| !map.tick());
        drop(near);
        assert!(led.lead.complete(Outcome::new(1), 0, false));
    });
}

#[test]
fn an_offer_that_no_task_takes_is_withdrawn_after_a_second() {
    in_time(|| {
        let clock = Clock::hold();
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let leads = lead(&map, KEY);
        let stuck = join_as(&map, KEY, 1, tasks.task(1));
        let heir = join_as(&map, KEY, 2, tasks.task(2));
        drop(leads);
        assert_eq!(tasks.next(), 1);
        map.tick();
        assert_eq!(standings([&stuck, &heir]), [Standing::Offered, Standing::Waiting]);

        clock.advance(SECOND);
        expiry::wake_now();
        assert_eq!(tasks.next(), 2);
        assert_eq!(standings([&stuck, &heir]), [Standing::Withdrawn, Standing::Offered]);
        assert!(stuck.take_lead(0).is_none());
        let leads = heir.take_lead(0).expect("it was offered");
        assert!(leads.complete(Outcome::new(2), FOREVER, false));
        // It was told to ask again.
        assert_eq!((stuck.outcome().is_none(), hit(&map, KEY)), (true, Some(2)));
    });
}

#[test]
fn an_offer_that_the_last_task_does_not_take_ends_the_flight() {
    in_time(|| {
        let clock = Clock::hold();
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let leads = lead(&map, KEY);
        let stuck = join_as(&map, KEY, 1, tasks.task(1));
        drop(leads);
        clock.advance(SECOND);
        eventually(|| {
            map.tick();
            map.stats().in_flight == 0
        });
        assert_eq!((stuck.standing(), contains(&map, KEY)), (Standing::Withdrawn, false));
    });
}

#[test]
fn an_offer_to_a_thread_stands() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let heir = join(&map, KEY);
    drop(leads);
    clock.advance(3600 * SECOND);
    assert!(!map.tick());
    assert!(heir.take_lead(0).is_some());
}

#[test]
fn a_task_that_leaves_with_the_offer_passes_it_on() {
    let _clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_on_loop_1(&map, &tasks);
    let first = join_as(&map, KEY, 2, tasks.task(1));
    let second = join_as(&map, KEY, 1, tasks.task(2));
    assert!(led.lead.abandon(false));
    drop(first);
    assert_eq!((second.standing(), tasks.woken()), (Standing::Offered, vec![CALLER, 1, 2]));
    drop(second);
    assert_eq!((contains(&map, KEY), map.stats().in_flight), (false, 0));
    assert!(!led.call.cancelled());
}
