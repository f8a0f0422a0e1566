//! A flight that is over age is left to those who wait for it.

use std::sync::Arc;
use std::time::Duration;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::State;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::ops::{forget, load, put, reports};
use crate::support::{
    Clock, Outcome, Plain, SECOND, Served, Tasks, Turn, contains, eventually, hit, in_time, join, join_as,
    lead, read, request, turn,
};

const KEY: u64 = 7;
const HOUR: u64 = 3600 * SECOND;

/// Flights are over age after an hour. The name tells whose reports are whose.
fn map(name: &str) -> Arc<Map<Plain>> {
    Map::new(Settings { name: Some(name.into()), max_flight: HOUR, ..Settings::default() })
}

fn in_hours(age: Duration) -> u64 {
    age.as_secs() / 3600
}

#[test]
fn the_next_caller_leads_and_present_waiters_keep_theirs() {
    let clock = Clock::hold();
    let map = map("next");
    let old = lead(&map, KEY);
    let early = join(&map, KEY);
    clock.advance(HOUR / 2);
    let later = join(&map, KEY);
    clock.advance(HOUR / 2 + SECOND);
    assert_eq!((contains(&map, KEY), load(&map)), (true, (1, 0)));
    let new = lead(&map, KEY);
    let late = join(&map, KEY);
    assert_eq!((map.keys(), map.flights().len(), load(&map)), (1, 2, (2, 0)));

    assert!(new.complete(Outcome::new(2), FOREVER, false));
    assert_eq!([&early, &later].map(llm_batch_coalesce::lead::Place::standing), [Standing::Waiting; 2]);
    assert!(old.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((read(&early), read(&later), read(&late)), (1, 1, 2));
    assert_eq!((hit(&map, KEY), map.keys(), load(&map)), (Some(2), 1, (0, 1)));
    assert_eq!(map.stats().calls, 2);
}

#[test]
fn the_older_outcome_does_not_come_before_the_newer_one() {
    let clock = Clock::hold();
    let map = map("before");
    let old = lead(&map, KEY);
    clock.advance(HOUR + SECOND);
    let new = lead(&map, KEY);
    let late = join(&map, KEY);
    assert!(old.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((late.standing(), hit(&map, KEY), load(&map)), (Standing::Waiting, None, (1, 0)));
    drop(new);
    assert!(late.take_lead(0).expect("it was offered").complete(Outcome::new(2), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (Some(2), (0, 1)));
}

#[test]
fn an_old_flight_that_nobody_asked_for_since_is_retained() {
    let clock = Clock::hold();
    let map = map("unasked");
    let old = lead(&map, KEY);
    let early = join(&map, KEY);
    clock.advance(HOUR + SECOND);
    assert!(old.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((read(&early), hit(&map, KEY), load(&map)), (1, Some(1), (0, 1)));
    clock.advance(2 * HOUR);
    assert_eq!(hit(&map, KEY), Some(1), "only flights come over age");
}

#[test]
fn the_lead_of_an_old_flight_may_still_be_handed_over() {
    let clock = Clock::hold();
    let map = map("handed over");
    let old = lead(&map, KEY);
    let (heir, early) = (join(&map, KEY), join(&map, KEY));
    clock.advance(HOUR + SECOND);
    assert!(lead(&map, KEY).complete(Outcome::new(2), FOREVER, false));
    drop(old);
    assert!(heir.take_lead(0).expect("it was offered").complete(Outcome::new(3), FOREVER, false));
    assert_eq!((read(&early), hit(&map, KEY), load(&map)), (3, Some(2), (0, 1)));
}

#[test]
fn a_new_attempt_restarts_the_age() {
    let clock = Clock::hold();
    let map = map("restarts");
    let leads = lead(&map, KEY);
    let heir = join(&map, KEY);
    clock.advance(HOUR - 60 * SECOND);
    drop(leads);
    let leads = heir.take_lead(0).expect("it was offered");
    clock.advance(HOUR - 60 * SECOND);
    let waiter = join(&map, KEY);
    assert_eq!(in_hours(Duration::from_nanos(map.flights()[0].age)), 0);
    clock.advance(61 * SECOND);
    assert!(matches!(turn(&map, KEY), Turn::Lead(_)));
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!(read(&waiter), 1);
}

#[test]
fn an_offer_that_nobody_has_come_for_is_as_old_as_its_flight() {
    let clock = Clock::hold();
    let map = map("offered");
    let leads = lead(&map, KEY);
    let heir = join(&map, KEY);
    drop(leads);
    clock.advance(HOUR + SECOND);
    let new = lead(&map, KEY);
    let old = heir.take_lead(0).expect("it was offered");
    assert!(old.complete(Outcome::new(1), FOREVER, false));
    assert_eq!(hit(&map, KEY), None);
    assert!(new.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (Some(2), (0, 1)));
}

#[test]
fn an_old_flight_that_comes_to_nothing_leaves_the_newer_one_alone() {
    let clock = Clock::hold();
    let map = map("nothing");
    let old = lead(&map, KEY);
    let flight = Arc::clone(old.flight());
    clock.advance(HOUR + SECOND);
    let new = lead(&map, KEY);
    drop(old);
    assert_eq!((flight.state(), contains(&map, KEY), load(&map)), (State::Ended, true, (1, 0)));
    assert!(new.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (Some(2), (0, 1)));
}

#[test]
fn an_old_flight_can_be_forgotten_and_replaced() {
    let clock = Clock::hold();
    let map = map("forgotten");
    let leads = [KEY, KEY + 1].map(|key| lead(&map, key));
    clock.advance(HOUR + SECOND);
    assert!(forget(&map, KEY));
    put(&map, KEY + 1, Outcome::new(2), FOREVER);
    assert_eq!((map.keys(), load(&map)), (1, (2, 1)));
    for leads in leads {
        assert!(leads.complete(Outcome::new(1), FOREVER, false));
    }
    assert_eq!((hit(&map, KEY), hit(&map, KEY + 1), load(&map)), (None, Some(2), (0, 1)));
}

#[test]
fn it_is_reported_once() {
    in_time(|| {
        let clock = Clock::hold();
        let map = map("reported");
        let old = lead(&map, KEY);
        clock.advance(HOUR / 2);
        let young = lead(&map, KEY + 1);
        map.tick();
        assert_eq!(reports(&map), []);
        clock.advance(HOUR / 2 + SECOND);
        // Whoever looks first, this test or the sweeper.
        eventually(|| {
            map.tick();
            !reports(&map).is_empty()
        });
        for _ in 0..3 {
            map.tick();
        }
        let hours: Vec<_> = reports(&map).iter().map(|&(key, age)| (key, in_hours(age))).collect();
        assert_eq!(hours, [(KEY, 1)]);

        clock.advance(HOUR);
        eventually(|| {
            map.tick();
            reports(&map).len() > 1
        });
        map.tick();
        let keys: Vec<_> = reports(&map).iter().map(|&(key, _)| key).collect();
        assert_eq!(keys, [KEY, KEY + 1]);
        drop((old, young));
        eventually(|| !map.tick());
    });
}

#[test]
fn it_is_reported_though_it_was_forgotten_and_anew_when_the_lead_was_taken_over() {
    in_time(|| {
        let clock = Clock::hold();
        let map = map("anew");
        let old = lead(&map, KEY);
        let heir = join(&map, KEY);
        assert!(forget(&map, KEY));
        clock.advance(HOUR + SECOND);
        eventually(|| {
            map.tick();
            reports(&map).len() == 1
        });
        drop(old);
        let leads = heir.take_lead(0).expect("it was offered");
        for _ in 0..3 {
            map.tick();
        }
        assert_eq!(reports(&map).len(), 1);
        clock.advance(2 * HOUR);
        eventually(|| {
            map.tick();
            reports(&map).len() == 2
        });
        assert!(leads.complete(Outcome::new(2), FOREVER, false));
        let hours: Vec<_> = reports(&map).iter().map(|&(key, age)| (key, in_hours(age))).collect();
        assert_eq!(hours, [(KEY, 1), (KEY, 2)]);
    });
}

#[test]
fn what_has_landed_in_time_is_not_reported() {
    in_time(|| {
        let clock = Clock::hold();
        let map = map("in time");
        assert!(lead(&map, KEY).complete(Outcome::new(1), FOREVER, false));
        drop(lead(&map, KEY + 1));
        clock.advance(2 * HOUR);
        eventually(|| !map.tick());
        assert_eq!(reports(&map), []);
    });
}

#[test]
fn without_a_limit_no_flight_is_too_old() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings { name: Some("no limit".into()), ..Settings::default() });
    let leads = lead(&map, KEY);
    clock.advance(1000 * HOUR);
    let waiter = join(&map, KEY);
    assert!(!map.tick(), "nothing needs a look");
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((read(&waiter), reports(&map)), (1, vec![]));
}

#[test]
fn a_task_that_takes_over_an_old_flight_is_looked_after() {
    in_time(|| {
        let clock = Clock::hold();
        let (map, tasks) = (map("task"), Tasks::new());
        let leads = lead(&map, KEY);
        let heir = join_as(&map, KEY, 1, tasks.task(1));
        clock.advance(HOUR + SECOND);
        eventually(|| {
            map.tick();
            reports(&map).len() == 1
        });
        drop(leads);
        let leads = heir.take_lead(0).expect("it was offered");
        assert_eq!(request(&map, KEY + 1, drop), Served::Led);
        eventually(|| map.tick());
        clock.advance(HOUR + SECOND);
        eventually(|| {
            map.tick();
            reports(&map).len() == 2
        });
        drop(leads);
    });
}
