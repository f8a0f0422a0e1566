//! How much of a stream is kept, for whom, and how it ends.

use std::sync::mpsc::{self, Receiver};
use std::thread;

use llm_batch_coalesce::stream::{End, Reader, Stream, Turn};

use crate::stream::{QUIET, WIDE, append, append_all, begin, begin_pulled, items, next, up_to};
use crate::support::{Outcome, Plain, in_time};

fn lag(reader: &Reader<Plain>) -> u64 {
    if let Turn::Lagged(items) = next(reader) { items } else { panic!("it does not lag") }
}

/// Appends items that tell when they are dropped.
fn watched(stream: &Stream<Plain>, values: impl IntoIterator<Item = u64>) -> Receiver<u64> {
    let (sender, dropped) = mpsc::channel();
    for value in values {
        assert!(stream.append(Outcome::watched(value, &sender), false).is_ok());
    }
    dropped
}

fn since_the_last_look(dropped: &Receiver<u64>) -> Vec<u64> {
    dropped.try_iter().collect()
}

#[test]
fn nobody_can_join_once_it_has_outgrown_its_bound() {
    for most in [0, 1, 3] {
        let (stream, _reader) = begin(most);
        let closed: Vec<_> = (0..6).map(|value| append(&stream, value).closed).collect();
        assert_eq!(closed, [0, 1, 2, 3, 4, 5].map(|value| value == most), "once, by the first one too many");
        assert!(stream.join().is_none());
    }
    let (stream, _reader) = begin(3);
    append_all(&stream, 0..3);
    let last = stream.join().expect("it is just full");
    assert_eq!(items(&last), up_to(3));
    assert!(append(&stream, 3).closed && stream.end(End::Finished));
    assert!(stream.join().is_none(), "its first items have gone");
}

#[test]
fn what_all_have_passed_is_kept_as_long_as_others_can_join() {
    let (stream, first) = begin(3);
    let second = stream.join().expect("it is open");
    let dropped = watched(&stream, 0..3);
    assert_eq!((items(&first), items(&second)), (up_to(3), up_to(3)));
    assert_eq!(since_the_last_look(&dropped), Vec::<u64>::new());
    let more = watched(&stream, 3..5);
    assert_eq!((since_the_last_look(&dropped), since_the_last_look(&more)), (up_to(3), vec![]));
    assert_eq!(items(&first), [3, 4]);
    assert_eq!(since_the_last_look(&more), Vec::<u64>::new(), "the second one has not read them");
    assert_eq!(items(&second), [3, 4]);
    assert_eq!(since_the_last_look(&more), [3, 4]);
    // A reader that leaves needs nothing any more.
    let more = watched(&stream, 5..7);
    assert_eq!((items(&first), since_the_last_look(&more)), (vec![5, 6], vec![]));
    drop(second);
    assert_eq!(since_the_last_look(&more), [5, 6]);
}

#[test]
fn who_is_too_far_behind_lags_and_nobody_else() {
    let (stream, quick) = begin(3);
    let [slow, slowest] = [(); 2].map(|()| stream.join().expect("it is open"));
    append_all(&stream, 0..2);
    assert_eq!((items(&quick), items(&slow)), (vec![0, 1], vec![0, 1]));
    append_all(&stream, 2..4);
    assert_eq!((lag(&slowest), items(&quick)), (2, vec![2, 3]));
    append_all(&stream, 4..7);
    assert_eq!((lag(&slowest), lag(&slow), items(&quick)), (4, 2, vec![4, 5, 6]));
    // They hold nothing, and miss what is appended now, too.
    let dropped = watched(&stream, 7..9);
    assert_eq!((items(&quick), since_the_last_look(&dropped)), (vec![7, 8], vec![7, 8]));
    assert_eq!((lag(&slowest), lag(&slow)), (9, 7));
    assert!(stream.end(End::Finished));
    assert_eq!((lag(&slowest), lag(&slow)), (9, 7), "they have not read all, though it is over");
    assert!(matches!(next(&quick), Turn::Finished));
}

#[test]
fn nobody_holds_the_source_up() {
    const ITEMS: u64 = 20_000;
    let mut dropped = in_time(|| {
        let (stream, idle) = begin(8);
        let (sender, dropped) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..3 {
                let reader = stream.join().expect("it is open");
                scope.spawn(move || {
                    let mut seen = Vec::new();
                    let lags = loop {
                        match next(&reader) {
                            Turn::Items(items) => seen.extend(items),
                            Turn::Wait => drop(reader.wait_here().map(|waiting| waiting.wait(None))),
                            Turn::Lagged(lags) => break lags,
                            Turn::Finished => break 0,
                            _ => panic!("it is finished in the end"),
                        }
                    };
                    let number = seen.len() as u64;
                    assert!(seen == up_to(number) && (lags > 0 || number == ITEMS));
                });
            }
            for value in 0..ITEMS {
                assert!(stream.append(Outcome::watched(value, &sender), false).is_ok());
            }
            assert!(stream.end(End::Finished));
        });
        assert!(lag(&idle) >= ITEMS - 8);
        drop(idle);
        since_the_last_look(&dropped)
    });
    dropped.sort_unstable();
    assert_eq!(dropped, up_to(ITEMS), "each is dropped once");
}

#[test]
fn an_error_comes_after_the_items_for_all_readers() {
    let (stream, reader) = begin(WIDE);
    append_all(&stream, 0..2);
    assert!(stream.end(End::Failed(Outcome::new(9))));
    for reader in [&reader, &stream.join().expect("what has ended can be read")] {
        assert_eq!(items(reader), [0, 1]);
        assert!(matches!((next(reader), next(reader)), (Turn::Failed(9), Turn::Failed(9))));
    }
    let mut held = Vec::new();
    stream.for_each(|outcome| held.push(outcome.value));
    assert_eq!(held, [0, 1, 9]);
}

#[test]
fn what_breaks_before_the_first_item_is_started_over() {
    for error in [None, Some(Outcome::new(9))] {
        let (stream, first) = begin_pulled();
        let second = stream.join().expect("it is open");
        assert!(matches!((next(&first), next(&second)), (Turn::Pull, Turn::Wait)));
        assert!(stream.end(End::Broken(error)));
        assert!(matches!((next(&first), next(&second)), (Turn::StartOver, Turn::StartOver)));
        assert!(stream.join().is_none());
    }
}

#[test]
fn what_breaks_later_is_broken_for_all_who_read() {
    for (error, told) in [(None, None), (Some(Outcome::new(9)), Some(9))] {
        let (stream, ahead) = begin(WIDE);
        let behind = stream.join().expect("it is open");
        append_all(&stream, 0..2);
        assert_eq!(items(&ahead), [0, 1]);
        assert!(stream.end(End::Broken(error)));
        assert_eq!(items(&behind), [0, 1], "what was appended is read first");
        for reader in [ahead, behind] {
            assert!(matches!(next(&reader), Turn::Broken(error) if error == told));
        }
        assert!(stream.join().is_none());
    }
}

#[test]
fn a_stream_ends_once() {
    let (stream, reader) = begin(WIDE);
    append(&stream, 0);
    assert!(stream.end(End::Finished));
    assert!(!stream.end(End::Failed(Outcome::new(9))) && !stream.end(End::Broken(None)));
    assert_eq!(stream.append(Outcome::new(1), false).err().map(|item| item.value), Some(1));
    assert_eq!(items(&reader), [0]);
    assert!(matches!(next(&reader), Turn::Finished));
    assert!(!reader.leave() && stream.join().is_some(), "there is nothing to close");
}

#[test]
fn the_last_reader_that_leaves_ends_it() {
    let (stream, first) = begin(WIDE);
    let [second, third] = [(); 2].map(|()| stream.join().expect("it is open"));
    append(&stream, 0);
    assert!(!first.leave() && !first.leave());
    drop(first);
    drop(second);
    assert_eq!((stream.readers(), append(&stream, 1)), (1, QUIET));
    assert_eq!(items(&third), [0, 1]);
    assert!(third.leave() && !third.leave(), "one is told, once");
    assert_eq!(stream.append(Outcome::new(2), false).err().map(|item| item.value), Some(2));
    assert!(stream.join().is_none() && !stream.end(End::Finished));
    assert_eq!(stream.readers(), 0);

    let (stream, only) = begin(WIDE);
    drop(only);
    assert!(stream.join().is_none(), "dropping it leaves");
}

#[test]
fn one_that_finishes_goes_on_without_readers() {
    let (stream, first) = Stream::<Plain>::begin(3, true, true);
    assert!(!first.leave());
    append_all(&stream, 0..2);
    let late = stream.join().expect("it is open");
    assert_eq!((items(&late), late.leave()), (vec![0, 1], false));
    let dropped = watched(&stream, 2..4);
    assert_eq!(since_the_last_look(&dropped), [2, 3], "nobody can read them any more");
    assert!(stream.append(Outcome::new(4), false).is_err(), "there are no later readers to finish it for");
    assert!(stream.join().is_none() && !stream.end(End::Finished));
}

#[test]
fn the_last_to_leave_lets_go_of_the_items() {
    let (stream, reader) = begin(WIDE);
    let dropped = watched(&stream, 0..3);
    assert!(reader.leave());
    assert_eq!(since_the_last_look(&dropped), up_to(3));
    drop(stream);
}

#[test]
fn what_all_have_passed_goes_when_it_breaks() {
    let (stream, reader) = begin(WIDE);
    let dropped = watched(&stream, 0..3);
    assert_eq!(items(&reader), up_to(3));
    assert!(stream.end(End::Broken(None)));
    assert_eq!(since_the_last_look(&dropped), up_to(3));
    drop(stream);
}

#[test]
fn a_task_that_waits_anew_is_on_the_list_once() {
    let (tasks, (stream, stays)) = (crate::support::Tasks::new(), begin(WIDE));
    let reader = stream.join().expect("it is open");
    for name in 0..3 {
        assert!(reader.await_more(1, tasks.task(name)));
    }
    let before = stream.waiting();
    drop(reader);
    assert_eq!((before, stream.waiting()), (1, 0));
    drop(stays);
}

#[test]
fn who_has_left_takes_nothing() {
    let (stream, reader) = begin(WIDE);
    let _other = stream.join();
    append(&stream, 0);
    reader.leave();
    assert!(matches!(next(&reader), Turn::Broken(None)));
}

#[test]
fn a_wait_ends_when_its_reader_leaves() {
    in_time(|| {
        let (_stream, reader) = begin(WIDE);
        let enlisted = std::sync::Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                let waiting = reader.wait_here().expect("nothing is there");
                enlisted.wait();
                waiting.wait(None);
            });
            enlisted.wait();
            assert!(reader.leave());
        });
    });
}
