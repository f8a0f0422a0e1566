//! Rule 5: a caller that depends on another event loop is looked after from the moment that it waits.

use std::sync::Arc;

use llm_batch_coalesce::seat::Standing;
use loom::thread;

use crate::support::{FakeCall, LOOP, hold_clock, join_as_task, lead_on, new_map};

#[test]
fn a_look_of_the_sweeper_does_not_miss_who_joins_meanwhile() {
    let _clock = hold_clock();
    loom::model(|| {
        let map = new_map();
        let leads = lead_on(&map, LOOP);
        let caller = leads.seat_caller(LOOP, false);
        let call = Arc::new(FakeCall::default());
        leads.led_by(Arc::clone(&call));
        let sweeper = {
            let map = Arc::clone(&map);
            thread::spawn(move || map.tick())
        };
        let place = join_as_task(&map, leads.flight()).expect("it is pending");
        sweeper.join().expect("no panic");
        call.lose();
        map.tick();
        assert_eq!((place.standing(), caller.standing()), (Standing::Offered, Standing::Cancelled));
    });
}

#[test]
fn who_joins_before_the_call_is_known_is_looked_after_too() {
    let _clock = hold_clock();
    loom::model(|| {
        let map = new_map();
        let leads = lead_on(&map, LOOP);
        let other = {
            let (map, flight) = (Arc::clone(&map), Arc::clone(leads.flight()));
            thread::spawn(move || join_as_task(&map, &flight).expect("it is pending"))
        };
        let caller = leads.seat_caller(LOOP, false);
        let call = Arc::new(FakeCall::default());
        leads.led_by(Arc::clone(&call));
        let place = other.join().expect("no panic");
        call.lose();
        map.tick();
        assert_eq!((place.standing(), caller.standing()), (Standing::Offered, Standing::Cancelled));
    });
}
