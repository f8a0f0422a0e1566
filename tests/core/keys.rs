//! Keys that make it hard: they share a hash, cannot be compared, or come back to the map while they are compared.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Weak};
use std::thread;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::family::Family;
use llm_batch_coalesce::lead::Lead;
use llm_batch_coalesce::map::{Found, Map, Settings};
use llm_batch_coalesce::stats::Stats;
use llm_batch_coalesce::waiter::{NO_LOOP, Origin, Waiter};

use crate::support::{eventually, in_time};

/// The only hash of these tests.
const HASH: u64 = 0x0123_4567_89ab_cdef;

struct Odd;

#[derive(Clone)]
struct Key {
    number: u64,
    manner: Manner,
}

#[derive(Clone)]
enum Manner {
    Plain,
    /// Can be compared so many times more.
    Fails(Arc<AtomicU32>),
    /// Asks the map for another key while it is compared.
    Asks(Weak<Map<Odd>>),
    /// Meets the test when it begins to be compared, and again before it is done.
    Meets(Arc<Barrier>),
}

impl Key {
    fn plain(number: u64) -> Self {
        Self { number, manner: Manner::Plain }
    }

    fn fails(number: u64, after: u32) -> Self {
        Self { number, manner: Manner::Fails(Arc::new(AtomicU32::new(after))) }
    }

    fn asks(number: u64, map: &Arc<Map<Odd>>) -> Self {
        Self { number, manner: Manner::Asks(Arc::downgrade(map)) }
    }

    fn before_comparison(&self) -> Result<(), Incomparable> {
        match &self.manner {
            Manner::Plain => {}
            Manner::Fails(left) => {
                let counted = left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
                counted.map_err(|_| Incomparable)?;
            }
            Manner::Meets(test) => {
                test.wait();
                test.wait();
            }
            Manner::Asks(map) => ask(&map.upgrade().expect("a test holds it"), self.number + ASKED),
        }
        Ok(())
    }
}

/// What a key adds to its own number for the key that it asks for.
const ASKED: u64 = 1000;

/// Gets another key's outcome on the way, but not from within itself.
fn ask(map: &Arc<Map<Odd>>, number: u64) {
    thread_local! {
        static ASKING: Cell<bool> = const { Cell::new(false) };
    }
    if !ASKING.replace(true) {
        let key = Key::plain(number);
        if let Ok(Found::Nothing) = find(map, &key)
            && let Ok(Some(lead)) = claim(map, &key)
        {
            assert!(lead.complete(Arc::new(number), FOREVER, false));
        }
        ASKING.set(false);
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Incomparable;

impl Family for Odd {
    type Key = Key;
    /// Its count tells how many handles there are.
    type Outcome = Arc<u64>;
    type Error = Incomparable;
    type Task = ();
    type Call = ();

    fn wake_fan() -> usize {
        1
    }

    fn same(stored: &Key, wanted: &Key) -> Result<bool, Incomparable> {
        stored.before_comparison()?;
        wanted.before_comparison()?;
        Ok(stored.number == wanted.number)
    }

    fn wake_tasks(_: Vec<Arc<Waiter<Self>>>) {}

    fn share_call((): &()) {}

    fn cancel_call((): ()) {}

    fn task_is_lost((): &()) -> bool {
        false
    }

    fn call_is_lost((): &()) -> bool {
        false
    }
}

fn find(map: &Map<Odd>, key: &Key) -> Result<Found<Odd, u64>, Incomparable> {
    map.find(HASH, key, |outcome, _| **outcome)
}

fn hit(map: &Map<Odd>, key: &Key) -> Result<Option<u64>, Incomparable> {
    Ok(if let Found::Hit(value) = find(map, key)? { Some(value) } else { None })
}

fn claim(map: &Arc<Map<Odd>>, key: &Key) -> Result<Option<Lead<Odd>>, Incomparable> {
    map.claim(HASH, key.clone(), Origin { loop_id: NO_LOOP, thread: 0 })
}

fn lead(map: &Arc<Map<Odd>>, key: &Key) -> Lead<Odd> {
    claim(map, key).expect("it can be compared").expect("nobody has it")
}

#[test]
fn a_thousand_keys_may_share_a_hash() {
    in_time(|| {
        let map = Map::<Odd>::new(Settings::default());
        for _ in 0..2 {
            let leads: Vec<_> = (0..1000).map(|number| lead(&map, &Key::plain(number))).collect();
            assert_eq!((map.keys(), map.stats().in_flight), (1000, 1000));
            for (value, lead) in (0..).zip(leads) {
                // Every third goes at once.
                assert!(lead.complete(Arc::new(value), if value % 3 == 0 { 0 } else { FOREVER }, false));
            }
            assert_eq!((map.keys(), map.stats().retained), (666, 666));
            for number in 0..1000 {
                let expected = (number % 3 != 0).then_some(number);
                assert_eq!(hit(&map, &Key::plain(number)), Ok(expected));
            }
            let mut seen = Vec::new();
            map.for_each(|flight| seen.push(flight.key().number));
            seen.sort_unstable();
            assert_eq!(seen, (0..1000).filter(|number| number % 3 != 0).collect::<Vec<_>>());
            map.clear();
            assert_eq!((map.keys(), map.stats().retained), (0, 0));
        }
    });
}

#[test]
fn threads_that_share_only_a_hash_do_not_disturb_each_other() {
    in_time(|| {
        let map = Map::<Odd>::new(Settings::default());
        thread::scope(|scope| {
            for start in [0, 100, 200, 300] {
                let map = &map;
                scope.spawn(move || {
                    for number in start..start + 100 {
                        let key = Key::plain(number);
                        // Once for nothing, so that entries come and go.
                        drop(lead(map, &key));
                        assert!(lead(map, &key).complete(Arc::new(number), FOREVER, false));
                        assert_eq!(hit(map, &key), Ok(Some(number)));
                    }
                });
            }
        });
        let expected = Stats { calls: 800, hits: 400, retained: 400, ..Stats::default() };
        assert_eq!((map.keys(), map.stats()), (400, expected));
    });
}

#[test]
fn a_key_that_cannot_be_compared_changes_nothing() {
    let map = Map::<Odd>::new(Settings::default());
    assert!(lead(&map, &Key::plain(1)).complete(Arc::new(1), FOREVER, false));
    let leads = lead(&map, &Key::plain(2));
    let before = map.stats();
    // It fails at the first of the two, or at the second.
    for after in [0, 1] {
        assert!(matches!(find(&map, &Key::fails(3, after)), Err(Incomparable)));
        assert_eq!(map.contains(HASH, &Key::fails(3, after)), Err(Incomparable));
        assert_eq!(map.waiters(HASH, &Key::fails(3, after)), Err(Incomparable));
        let bad = Key::fails(3, after);
        assert!(matches!(claim(&map, &bad), Err(Incomparable)));
        let Manner::Fails(count) = bad.manner else { unreachable!() };
        assert_eq!(Arc::strong_count(&count), 1, "its flight is still somewhere");
        assert_eq!((map.keys(), map.stats()), (2, before));
    }
    assert!(leads.complete(Arc::new(2), FOREVER, false));
    assert_eq!((hit(&map, &Key::plain(1)), hit(&map, &Key::plain(2))), (Ok(Some(1)), Ok(Some(2))));
}

#[test]
fn a_stored_key_that_cannot_be_compared_any_more_can_be_removed() {
    let map = Map::<Odd>::new(Settings::default());
    let leads = lead(&map, &Key::fails(1, 0));
    assert!(matches!(claim(&map, &Key::plain(2)), Err(Incomparable)));
    drop(leads);
    assert!(lead(&map, &Key::fails(1, 0)).complete(Arc::new(1), FOREVER, false));
    assert_eq!(hit(&map, &Key::plain(2)), Err(Incomparable));
    map.clear();
    assert_eq!((map.keys(), hit(&map, &Key::plain(2))), (0, Ok(None)));
}

#[test]
fn a_key_may_ask_the_map_while_it_is_compared() {
    in_time(|| {
        const KEYS: u64 = 40;
        let map = Map::<Odd>::new(Settings::default());
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for number in 0..KEYS {
                        let key = Key::asks(number, &map);
                        if let Ok(Found::Nothing) = find(&map, &key)
                            && let Ok(Some(lead)) = claim(&map, &key)
                        {
                            assert!(lead.complete(Arc::new(number), FOREVER, false));
                        }
                    }
                });
            }
        });
        for number in 0..KEYS {
            assert_eq!(hit(&map, &Key::asks(number, &map)), Ok(Some(number)));
            assert_eq!(hit(&map, &Key::plain(number + ASKED)), Ok(Some(number + ASKED)));
        }
        assert_eq!((map.keys(), map.stats().calls, map.stats().in_flight), (80, 2 * KEYS, 0));
    });
}

/// A reader that is in the middle of a comparison can still see what is removed meanwhile.
#[test]
fn what_is_removed_under_a_reader_is_dropped_when_that_is_done() {
    in_time(|| {
        let map = Map::<Odd>::new(Settings::default());
        let (outcome, meeting) = (Arc::new(1), Arc::new(Barrier::new(2)));
        assert!(lead(&map, &Key::plain(1)).complete(Arc::clone(&outcome), FOREVER, false));
        thread::scope(|scope| {
            let reader = Key { number: 2, manner: Manner::Meets(Arc::clone(&meeting)) };
            let map = &map;
            scope.spawn(move || assert_eq!(hit(map, &reader), Ok(None)));
            meeting.wait();
            map.clear();
            assert_eq!(Arc::strong_count(&outcome), 2);
            meeting.wait();
        });
        eventually(|| Arc::strong_count(&outcome) == 1);
        assert_eq!(map.keys(), 0);
    });
}
