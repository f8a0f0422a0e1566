//! Many read one stream: each reader gets every item, one of them pulls, and the others are woken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use llm_batch_coalesce::stream::{Appended, End, Reader, Stream, Turn};

use crate::support::{Outcome, Plain, Tasks, in_time};

/// A bound that no test reaches.
pub(crate) const WIDE: usize = 1_000_000;
pub(crate) const QUIET: Appended = Appended { closed: false, awaited: false };

pub(crate) fn begin(most: usize) -> (Arc<Stream<Plain>>, Reader<Plain>) {
    Stream::begin(most, false, true)
}

/// One whose readers pull.
pub(crate) fn begin_pulled() -> (Arc<Stream<Plain>>, Reader<Plain>) {
    Stream::begin(WIDE, false, false)
}

pub(crate) fn append<const FAN: usize>(stream: &Stream<Plain<FAN>>, value: u64) -> Appended {
    stream.append(Outcome::new(value), false).ok().expect("it is under way")
}

pub(crate) fn append_all(stream: &Stream<Plain>, values: impl IntoIterator<Item = u64>) {
    for value in values {
        append(stream, value);
    }
}

pub(crate) fn next<const FAN: usize>(reader: &Reader<Plain<FAN>>) -> Turn<u64> {
    reader.take(|outcome| outcome.value)
}

/// The items of a turn that must have some.
pub(crate) fn items(reader: &Reader<Plain>) -> Vec<u64> {
    if let Turn::Items(items) = next(reader) { items } else { panic!("there are no items") }
}

/// Reads on until there are at least `enough` items or the stream has ended, and pulls with `pull` when told to.
fn read(reader: &Reader<Plain>, enough: usize, pull: impl Fn()) -> Vec<u64> {
    let mut all = Vec::new();
    while all.len() < enough {
        match next(reader) {
            Turn::Items(items) => all.extend(items),
            Turn::Wait => {
                if let Some(waiting) = reader.wait_here() {
                    assert!(waiting.wait(None));
                }
            }
            Turn::Pull => pull(),
            Turn::Finished => break,
            _ => panic!("it goes on until it is finished"),
        }
    }
    all
}

/// Reads a stream to its end, in which no reader pulls.
fn read_all(reader: &Reader<Plain>) -> Vec<u64> {
    read(reader, usize::MAX, || panic!("another source appends"))
}

pub(crate) fn up_to(end: u64) -> Vec<u64> {
    (0..end).collect()
}

#[test]
fn every_reader_gets_every_item_in_order_whenever_it_joins() {
    let (stream, first) = begin(WIDE);
    let early = stream.join().expect("it is open");
    append_all(&stream, 0..3);
    assert_eq!((items(&first), items(&first.stream().join().expect("it is open"))), (up_to(3), up_to(3)));
    append_all(&stream, 3..5);
    let late = stream.join().expect("it is open");
    assert_eq!((items(&first), items(&early), items(&late)), (vec![3, 4], up_to(5), up_to(5)));
    assert!(matches!((next(&first), next(&late)), (Turn::Wait, Turn::Wait)));
    assert!(stream.end(End::Finished));
    drop((first, early, late));
    for _ in 0..2 {
        // Also when all that were there have left.
        let after = stream.join().expect("what has ended can be read");
        assert_eq!(items(&after), up_to(5));
        assert!(matches!(next(&after), Turn::Finished));
        assert!(matches!(next(&after), Turn::Finished));
    }
}

#[test]
fn threads_that_join_at_any_time_all_read_the_same() {
    const ITEMS: u64 = 2_000;
    in_time(|| {
        let (stream, first) = begin(WIDE);
        let start = Barrier::new(5);
        thread::scope(|scope| {
            for joins_after in [0, 100, 1_000, 1_900] {
                let (stream, start, ahead) = (&stream, &start, stream.join().expect("it is open"));
                scope.spawn(move || {
                    start.wait();
                    let seen = read(&ahead, joins_after, || panic!("another source appends"));
                    assert!(seen.len() >= joins_after);
                    let late = stream.join().expect("it is open");
                    drop(ahead);
                    assert_eq!(read_all(&late), up_to(ITEMS));
                });
            }
            start.wait();
            append_all(&stream, 0..ITEMS);
            assert!(stream.end(End::Finished));
        });
        assert_eq!((read_all(&first), stream.readers(), stream.waiting()), (up_to(ITEMS), 1, 0));
    });
}

#[test]
fn many_items_come_in_several_turns() {
    let (stream, reader) = begin(WIDE);
    append_all(&stream, 0..150);
    let turns = [items(&reader), items(&reader), items(&reader)];
    assert_eq!(turns.each_ref().map(Vec::len), [64, 64, 22]);
    assert_eq!(turns.concat(), up_to(150));
    assert!(matches!(next(&reader), Turn::Wait));
}

#[test]
fn one_reader_pulls_for_all() {
    let (stream, first) = begin_pulled();
    let second = stream.join().expect("it is open");
    assert!(matches!((next(&first), next(&second), next(&first)), (Turn::Pull, Turn::Wait, Turn::Wait)));
    assert_eq!(stream.append(Outcome::new(0), false).ok(), Some(QUIET));
    assert_eq!((items(&first), items(&second)), (vec![0], vec![0]));
    assert!(matches!((next(&second), next(&first)), (Turn::Wait, Turn::Wait)), "the first one pulls on");
    assert_eq!(stream.append(Outcome::new(1), true).ok(), Some(QUIET));
    assert_eq!(items(&second), [1]);
    assert!(matches!(next(&second), Turn::Pull), "nobody pulls, and it is at the front");
    assert_eq!(items(&first), [1]);
    assert!(matches!(next(&first), Turn::Wait));
}

#[test]
fn who_leaves_instead_of_pulling_can_give_the_duty_back() {
    let (tasks, (stream, first)) = (Tasks::new(), begin_pulled());
    let second = stream.join().expect("it is open");
    assert!(matches!((next(&first), next(&second)), (Turn::Pull, Turn::Wait)));
    assert!(second.await_more(1, tasks.task(1)));
    let waiting = second.wait_here().expect("another one pulls");
    assert!(!first.leave());
    assert_eq!(tasks.woken(), Vec::<u64>::new(), "nothing can be done yet");
    stream.release();
    assert_eq!((tasks.woken(), waiting.wait(Some(Duration::ZERO)), stream.waiting()), (vec![1], true, 0));
    assert!(matches!(next(&second), Turn::Pull));
}

#[test]
fn another_reader_pulls_when_one_has_stopped() {
    const ITEMS: u64 = 2_000;
    in_time(|| {
        let (stream, last) = begin_pulled();
        let (upstream, pulling, start) = (AtomicU64::new(0), AtomicBool::new(false), Barrier::new(4));
        let pull = || {
            assert!(!pulling.swap(true, SeqCst), "another one pulls");
            let value = upstream.fetch_add(1, SeqCst);
            thread::yield_now();
            pulling.store(false, SeqCst);
            if value < ITEMS {
                assert!(stream.append(Outcome::new(value), true).is_ok());
            } else {
                assert!(stream.end(End::Finished));
            }
        };
        let seen: Vec<_> = thread::scope(|scope| {
            let readers = [(last, usize::MAX)].into_iter().chain(
                // Some leave on the way.
                [usize::MAX, 500, 1_000].map(|enough| (stream.join().expect("it is open"), enough)),
            );
            let read = |(reader, enough)| {
                start.wait();
                read(&reader, enough, pull)
            };
            let threads: Vec<_> = readers.map(|reader| scope.spawn(move || read(reader))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        for (seen, enough) in seen.iter().zip([ITEMS, ITEMS, 500, 1_000]) {
            assert!(seen.iter().copied().eq(0..seen.len() as u64) && seen.len() as u64 >= enough);
        }
        assert_eq!((seen[0].len() as u64, upstream.into_inner()), (ITEMS, ITEMS + 1));
    });
}

#[test]
fn nobody_waits_when_there_is_something_to_do() {
    let (tasks, (stream, reader)) = (Tasks::new(), begin_pulled());
    let refused = |reader: &Reader<Plain>| {
        let refused = (reader.wait_here().is_none(), !reader.await_more(1, tasks.task(1)));
        assert_eq!(reader.stream().waiting(), 0);
        refused
    };
    assert_eq!(refused(&reader), (true, true), "it may pull");
    assert!(matches!(next(&reader), Turn::Pull));
    append(&stream, 0);
    assert_eq!(refused(&reader), (true, true), "it has not read the item");
    assert_eq!(items(&reader), [0]);
    drop(reader.wait_here().expect("it has read all"));
    assert!(stream.end(End::Finished));
    assert_eq!(refused(&reader), (true, true), "it is over");

    let (stream, reader) = begin(1);
    append_all(&stream, 0..3);
    assert_eq!(refused(&reader), (true, true), "it lags");
    assert_eq!(tasks.woken(), Vec::<u64>::new());
}

/// All of them wait before it happens; some leave without having waited, the one that is woken first among them.
fn all_who_wait_are_woken_by<const FAN: usize>(happens: fn(&Stream<Plain<FAN>>)) {
    const WAITERS: usize = 16;
    in_time(move || {
        let (stream, reader) = Stream::<Plain<FAN>>::begin(WIDE, false, true);
        let enlisted = Barrier::new(WAITERS + 1);
        let [first, left_before] = [(); 2].map(|()| reader.wait_here().expect("nothing is there"));
        thread::scope(|scope| {
            for name in 0..WAITERS {
                let (enlisted, reader) = (&enlisted, stream.join().expect("it is open"));
                scope.spawn(move || {
                    let waiting = reader.wait_here().expect("nothing is there");
                    enlisted.wait();
                    if name % 2 == 0 {
                        assert!(waiting.wait(None));
                        assert!(matches!(next(&reader), Turn::Items(_) | Turn::Finished));
                    }
                });
            }
            enlisted.wait();
            drop(left_before);
            happens(&stream);
            drop(first);
        });
        assert_eq!((stream.waiting(), stream.readers()), (0, 1));
    });
}

fn an_item<const FAN: usize>(stream: &Stream<Plain<FAN>>) {
    assert!(append(stream, 1).awaited);
}

fn the_end<const FAN: usize>(stream: &Stream<Plain<FAN>>) {
    assert!(stream.end(End::Finished));
}

#[test]
fn all_who_wait_are_woken_though_others_leave() {
    all_who_wait_are_woken_by::<1>(an_item);
    all_who_wait_are_woken_by::<2>(an_item);
    all_who_wait_are_woken_by::<1>(the_end);
    all_who_wait_are_woken_by::<2>(the_end);
}

#[test]
fn tasks_are_woken_once_by_an_item_or_the_end() {
    let (tasks, (stream, first)) = (Tasks::new(), begin(WIDE));
    let second = stream.join().expect("it is open");
    assert!(first.await_more(1, tasks.task(1)) && second.await_more(2, tasks.task(2)));
    let thread = second.wait_here().expect("nothing is there");
    assert_eq!((stream.waiting(), tasks.woken()), (3, vec![]));
    assert_eq!(append(&stream, 0), Appended { closed: false, awaited: true });
    assert_eq!((stream.waiting(), tasks.woken(), thread.wait(Some(Duration::ZERO))), (0, vec![1, 2], true));
    assert_eq!((append(&stream, 1), tasks.woken()), (QUIET, vec![]));
    assert_eq!(items(&second), [0, 1]);
    assert!(second.await_more(2, tasks.task(3)));
    assert!(stream.end(End::Failed(Outcome::new(9))));
    assert_eq!((stream.waiting(), tasks.woken()), (0, vec![3]));
}

#[test]
fn a_task_whose_reader_leaves_is_on_no_list() {
    let (tasks, (stream, stays)) = (Tasks::new(), begin(WIDE));
    let leave = [0, 1, 2].map(|name| {
        let reader = stream.join().expect("it is open");
        assert!(reader.await_more(1, tasks.task(name)));
        reader
    });
    assert!(stays.await_more(1, tasks.task(3)));
    drop(leave);
    assert_eq!((stream.readers(), stream.waiting()), (1, 1));
    assert!(append(&stream, 0).awaited);
    assert_eq!(tasks.woken(), [3]);
}

#[test]
fn who_has_waited_long_enough_is_on_no_list() {
    let (stream, reader) = begin(WIDE);
    for limit in [Duration::ZERO, Duration::from_millis(1)] {
        let waiting = reader.wait_here().expect("nothing is there");
        assert_eq!((stream.waiting(), waiting.wait(Some(limit))), (1, false));
        drop(waiting);
        assert_eq!(stream.waiting(), 0);
    }
    assert_eq!(append(&stream, 0), QUIET);
    assert_eq!(items(&reader), [0]);
}
