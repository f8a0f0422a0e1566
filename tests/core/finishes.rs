//! A call that `finishes` goes on though all its callers have left.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::map::{Map, Settings};

use crate::ops::{Led, forget, lead_in_task, load};
use crate::support::{Call, Clock, Outcome, Plain, Tasks, contains, hit, join, join_as, read};

const KEY: u64 = 7;

fn led(map: &Arc<Map<Plain>>, tasks: &Tasks, finishes: bool) -> Led {
    lead_in_task(map, KEY, 1, tasks.task(0), finishes)
}

#[test]
fn its_outcome_is_retained_though_all_have_left() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let Led { lead: leads, caller, call } = led(&map, &tasks, true);
    let waiter = join_as(&map, KEY, 1, tasks.task(1));
    drop((caller, waiter));
    assert_eq!((call.cancelled(), contains(&map, KEY), load(&map)), (false, true, (1, 0)));
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map), call.cancelled()), (Some(1), (0, 1), false));
    assert!(tasks.woken().is_empty());
}

#[test]
fn it_can_be_joined_again_when_all_have_left() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let Led { lead: leads, caller, .. } = led(&map, &tasks, true);
    drop(caller);
    let late = join(&map, KEY);
    assert!(leads.complete(Outcome::new(1), 0, false));
    assert_eq!((read(&late), hit(&map, KEY)), (1, None));
}

#[test]
fn it_is_not_retained_if_it_was_forgotten() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let Led { lead: leads, caller, call } = led(&map, &tasks, true);
    drop(caller);
    assert!(forget(&map, KEY));
    assert_eq!((call.cancelled(), load(&map)), (false, (1, 0)));
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (None, (0, 0)));
}

#[test]
fn it_may_fail_with_nobody_left_to_take_over() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let Led { lead: leads, caller, .. } = led(&map, &tasks, true);
    drop(caller);
    assert!(!leads.abandon(true), "its caller is gone");
    assert_eq!((contains(&map, KEY), load(&map), map.stats().errors), (false, (0, 0), 1));
}

#[test]
fn each_caller_that_leads_decides_for_its_own_call() {
    let _clock = Clock::hold();
    for (first, second) in [(true, false), (false, true)] {
        let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
        let Led { lead: leads, caller, .. } = led(&map, &tasks, first);
        let heir = join_as(&map, KEY, 2, tasks.task(1));
        assert!(leads.abandon(false), "its caller waits");
        drop(caller);

        let leads = heir.take_lead(0).expect("it was offered");
        let call = Call::new();
        let caller = leads.seat_caller(2, second);
        leads.led_by(Arc::clone(&call));
        drop((heir, caller));
        assert_eq!((call.cancelled(), contains(&map, KEY)), (!second, second));
        assert_eq!(leads.complete(Outcome::new(2), FOREVER, false), second);
        assert_eq!((hit(&map, KEY), load(&map).0), (second.then_some(2), 0));
    }
}
