//! Rule 11: no reader of a shared stream misses an item or its end, one of them pulls, and the last ends it.
//!
//! Readers that wait are threads of their own, and nobody else locks the log while they are woken: loom takes it ill
//! when a thread is unparked while it waits for something else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use llm_batch_coalesce::stream::{Appended, End, Reader, Stream, Turn};
use loom::thread;

use crate::support::{Plain, Task};

fn begin(pumped: bool) -> (Arc<Stream<Plain>>, Reader<Plain>) {
    Stream::begin(8, false, pumped)
}

/// Whether the item was added, and what is known of it.
fn append(stream: &Stream<Plain>, value: u64) -> Option<Appended> {
    stream.append(Arc::new(value), true).ok()
}

fn next(reader: &Reader<Plain>) -> Turn<u64> {
    reader.take(|outcome| **outcome)
}

/// Reads until there are as many items as are wanted, or until the end, and pulls with `pull` when told to.
fn read(reader: &Reader<Plain>, wanted: usize, pull: impl Fn()) -> Vec<u64> {
    let mut seen = Vec::new();
    while seen.len() < wanted {
        match next(reader) {
            Turn::Items(items) => seen.extend(items),
            Turn::Wait => drop(reader.wait_here().map(|waiting| waiting.wait(None))),
            Turn::Pull => pull(),
            Turn::Finished => break,
            _ => panic!("it goes on until it is finished"),
        }
    }
    seen
}

fn never() {
    panic!("another source appends");
}

/// It has read the item before, or is woken by it; and a task is told, or was refused.
#[test]
fn an_item_reaches_a_reader_that_goes_to_wait() {
    loom::model(|| {
        let (stream, reader) = begin(true);
        let reads = thread::spawn(move || {
            let enlisted = reader.await_more(1, Task::Living);
            (enlisted, read(&reader, 1, never), reader)
        });
        let appended = stream.append(Arc::new(1), false).expect("it is under way");
        let (enlisted, seen, _reader) = reads.join().expect("no panic");
        assert_eq!((seen, stream.waiting()), (vec![1], 0));
        assert!(appended.awaited || !enlisted, "what is on the list is taken off it");
    });
}

/// What was appended before is read before.
#[test]
fn the_end_reaches_a_reader_that_goes_to_wait() {
    loom::model(|| {
        let (stream, reader) = begin(true);
        let reads = thread::spawn(move || (read(&reader, usize::MAX, never), reader));
        assert!(stream.append(Arc::new(1), false).is_ok());
        assert!(stream.end(End::Finished));
        let (seen, reader) = reads.join().expect("no panic");
        assert_eq!((seen, stream.waiting(), reader.await_more(1, Task::Living)), (vec![1], 0, false));
    });
}

/// It is read before the end, or given back.
#[test]
fn an_item_that_comes_while_the_stream_ends_is_not_lost() {
    loom::model(|| {
        let (stream, reader) = begin(true);
        let ends = thread::spawn(move || {
            assert!(reader.stream().end(End::Finished));
            read(&reader, usize::MAX, never)
        });
        let added = append(&stream, 1).is_some();
        assert_eq!(ends.join().expect("no panic"), if added { vec![1] } else { vec![] });
    });
}

/// Each item is pulled once, by one reader at a time. One of them leaves after the first item, which it may have pulled.
#[test]
fn one_of_two_readers_at_the_front_pulls() {
    loom::model(|| {
        let (stream, reader) = begin(false);
        let upstream = Arc::new((AtomicU64::new(0), AtomicBool::new(false)));
        let readers = [(1, stream.join().expect("it is open")), (2, reader)].map(|(wanted, reader)| {
            let upstream = Arc::clone(&upstream);
            thread::spawn(move || {
                let (pulls, pulling) = &*upstream;
                let pull = || {
                    assert!(!pulling.swap(true, SeqCst), "the other one pulls");
                    let value = pulls.fetch_add(1, SeqCst);
                    thread::yield_now();
                    pulling.store(false, SeqCst);
                    assert!(append(reader.stream(), value).is_some());
                };
                read(&reader, wanted, pull)
            })
        });
        let [leaves, stays] = readers.map(|reader| reader.join().expect("no panic"));
        assert!(stays == [0, 1] && stays.starts_with(&leaves), "{leaves:?} {stays:?}");
        assert_eq!((upstream.0.load(SeqCst), stream.readers(), stream.waiting()), (2, 0, 0));
    });
}

/// The other reader pulls, though it goes to wait at that moment.
#[test]
fn a_duty_that_is_given_back_reaches_a_reader_that_goes_to_wait() {
    loom::model(|| {
        let (stream, first) = begin(false);
        let second = stream.join().expect("it is open");
        assert!(matches!(next(&first), Turn::Pull));
        let reads = thread::spawn(move || {
            let pull = || assert!(append(second.stream(), 1).is_some());
            (read(&second, 1, pull), second)
        });
        stream.release();
        let (seen, _second) = reads.join().expect("no panic");
        assert_eq!((seen, stream.waiting()), (vec![1], 0));
    });
}

/// It is added, or given back; after that nobody adds anything.
#[test]
fn an_item_that_comes_while_the_last_reader_leaves_is_not_lost() {
    loom::model(|| {
        let (stream, reader) = begin(true);
        let leaves = thread::spawn(move || reader.leave());
        let item = Arc::new(1);
        let added = stream.append(Arc::clone(&item), false);
        assert!(leaves.join().expect("no panic"), "the source is to be closed");
        let given_back = added.err();
        assert!(given_back.is_none_or(|back| Arc::ptr_eq(&back, &item)));
        assert!(append(&stream, 2).is_none() && stream.join().is_none() && !stream.end(End::Finished));
        drop(stream);
        assert_eq!(Arc::strong_count(&item), 1);
    });
}

/// The stream ends with the last reader, or goes on for the one that joined.
#[test]
fn who_joins_while_the_last_reader_leaves_reads_or_is_refused() {
    loom::model(|| {
        let (stream, first) = begin(true);
        let joins = {
            let stream = Arc::clone(&stream);
            thread::spawn(move || stream.join())
        };
        let ended = first.leave();
        let second = joins.join().expect("no panic");
        assert_eq!(ended, second.is_none());
        assert_eq!(append(&stream, 1).is_some(), !ended);
        if let Some(second) = second {
            assert!(matches!(next(&second), Turn::Items(items) if items == [1]));
            assert!(second.leave(), "now it is the last");
        }
        assert!(stream.join().is_none());
    });
}

/// Of three threads one leaves while another one appends. The one behind it is woken, whoever comes first.
#[test]
fn a_waiter_that_leaves_while_it_is_woken_passes_the_baton_on() {
    loom::model(|| {
        let (stream, first) = begin(true);
        let second = stream.join().expect("it is open");
        let leaves = thread::spawn(move || {
            let waiting = first.wait_here().expect("nothing is there");
            // They begin to wait in this order.
            let waits = thread::spawn(move || {
                let waiting = second.wait_here().expect("nothing is there");
                let appends = thread::spawn(move || append(&stream, 1));
                assert!(waiting.wait(None));
                drop(waiting);
                (second, appends)
            });
            drop(waiting);
            (first, waits)
        });
        let (first, waits) = leaves.join().expect("no panic");
        let (second, appends) = waits.join().expect("no panic");
        assert_eq!(appends.join().expect("no panic"), Some(Appended { closed: false, awaited: true }));
        assert!([&first, &second].into_iter().all(|reader| matches!(next(reader), Turn::Items(_))));
        assert_eq!(first.stream().waiting(), 0);
    });
}
