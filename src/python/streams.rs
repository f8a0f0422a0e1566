//! Shared streams: a key space of their own, in which an outcome is a whole stream.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict, PyTuple};

use super::coalescer::Coalescer;
use super::family::{Outcome, Python3, TaskCall, check_interrupt, for_sure, report, undisturbed};
use super::ffi::{self, Held};
use super::hooks::Hooks;
use super::inside::{Call, Inside};
use super::key;
use super::options::Ttl;
use super::slot::Slot;
use crate::circle::Target;
use crate::family::Family;
use crate::flight::Flight;
use crate::lead::Lead;
use crate::map::Found;
use crate::stream::{End, Reader, Stream};
use crate::waiter::{NO_LOOP, Origin, Waiter};

/// The family of flights whose call yields a stream.
pub(super) struct Streams;

/// A stream that is shared: its log, its lead, and where its items come from.
pub(super) struct SharedStream {
    pub(super) log: Arc<Stream<Python3>>,
    /// Until the stream has ended.
    lead: Slot<Lead<Streams>>,
    call: OnceLock<Call>,
    /// The TTL in seconds that its leader asked for.
    pub(super) ttl: Option<Ttl>,
    /// The iterator that readers pull, between two pulls; or what closes the upstream of a pump. The last reader to leave
    /// closes it.
    pub(super) upstream: Slot<Held>,
    /// What that iterates over, if it is something else.
    pub(super) iterated: Slot<Held>,
    /// The task that pumps, and its caller's.
    task: Slot<TaskCall>,
    /// Whether the pump has nothing left to do but to close upstream.
    pump_ends: AtomicBool,
    /// Whether the reader that leads is still there, and the error that it is to get.
    leader_reads: AtomicBool,
    leaders_error: Slot<Py<PyAny>>,
    /// Whether it has had readers on another loop or thread than its pump's.
    read_elsewhere: AtomicBool,
}

impl SharedStream {
    /// The call that others may depend on, if it is under way.
    pub(super) fn under_way(&self) -> Option<Arc<dyn Target>> {
        self.call.get().and_then(Call::under_way)
    }

    pub(super) fn call(&self) -> Option<Call> {
        self.call.get().cloned()
    }

    /// Tells which task pumps, so that the last reader to leave can cancel it.
    pub(super) fn led_by(&self, task: TaskCall) {
        self.task.put(task);
    }

    /// From now on the pump is not cancelled, since that would only disturb it in closing upstream. It says so itself,
    /// where its task runs.
    pub(super) fn pump_ends(&self) {
        self.pump_ends.store(true, Ordering::Release);
    }

    pub(super) fn leader(&self) -> Option<TaskCall> {
        self.task.lock().as_ref().map(Python3::share_call)
    }

    pub(super) fn readers_besides_leader(&self) -> usize {
        self.log.readers().saturating_sub(usize::from(self.leader_reads.load(Ordering::Acquire)))
    }

    /// Adds an item. False if the stream is over.
    pub(super) fn append(&self, item: Py<PyAny>, release: bool) -> bool {
        match self.log.append(Outcome::Value(item.into()), release) {
            Ok(appended) => {
                if appended.closed {
                    let lead = self.lead.lock();
                    let flight =
                        lead.as_ref().map(|lead| (Arc::clone(lead.map()), Arc::clone(lead.flight())));
                    drop(lead);
                    if let Some((map, flight)) = flight {
                        map.let_go(&flight);
                    }
                }
                true
            }
            Err(item) => {
                drop(item);
                false
            }
        }
    }

    /// All items are there.
    pub(super) fn finish(self: &Arc<Self>, ttl: Ttl) {
        // A last reader that leaves now must not break what is about to be retained.
        self.log.see_through();
        if let Some(lead) = self.lead.take() {
            lead.complete(Arc::clone(self), ttl.nanos, false);
        }
        self.log.end(End::Finished);
    }

    /// Ends with an error for all readers.
    pub(super) fn fail(self: &Arc<Self>, template: Py<PyAny>, ttl: Ttl) {
        self.log.see_through();
        if let Some(lead) = self.lead.take() {
            lead.complete(Arc::clone(self), ttl.nanos, true);
        }
        self.log.end(End::Failed(Outcome::Error(template.into())));
    }

    /// Ends in a way that readers do not share; those that have read nothing start over.
    pub(super) fn break_off(&self, template: Option<Py<PyAny>>, failed: bool) {
        // Before they are told, so that they do not find it again.
        if let Some(lead) = self.lead.take() {
            lead.abandon(failed);
        }
        self.log.end(End::Broken(template.map(|template| Outcome::Error(template.into()))));
    }

    /// Keeps the original of an error for the reader that leads. False if that has left.
    pub(super) fn keep_for_leader(&self, error: &Bound<'_, PyAny>) -> bool {
        let reads = self.leader_reads.load(Ordering::Acquire);
        if reads {
            self.leaders_error.put(error.clone().unbind());
        }
        reads
    }

    pub(super) fn take_leaders_error(&self) -> Option<Py<PyAny>> {
        self.leaders_error.take()
    }

    pub(super) fn leader_leaves(&self) {
        self.leader_reads.store(false, Ordering::Release);
        drop(self.leaders_error.take());
    }

    /// What is to be closed when the last reader has left.
    pub(super) fn close(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        self.break_off(None, false);
        if let Some(task) = self.task.take() {
            undisturbed(py, || self.cancel_pump(py, &task));
        }
        if let Some(upstream) = self.upstream.take() {
            self.close_upstream(upstream.bind(py))?;
        }
        check_interrupt()
    }

    fn cancel_pump(self: &Arc<Self>, py: Python<'_>, pump: &TaskCall) {
        let stream = Arc::clone(self);
        let ends = move |_: &Bound<'_, PyTuple>, _: Option<&Bound<'_, PyDict>>| {
            Ok::<_, PyErr>(stream.pump_ends.load(Ordering::Acquire))
        };
        let cancelled = PyCFunction::new_closure(py, None, None, ends).and_then(|ends| {
            let hook = Hooks::get(py)?.cancel_pump.bind(py);
            for_sure(py, || ffi::call(hook, [pump.task.bind(py), ends.as_any()]))
        });
        report(py, cancelled);
    }

    /// Closes an iterator as generators are closed, and what it iterates over; some have nothing to close.
    pub(super) fn close_upstream(&self, upstream: &Bound<'_, PyAny>) -> PyResult<()> {
        let (py, iterated) = (upstream.py(), self.iterated.take());
        let none = py.None().into_bound(py);
        let iterated = iterated.as_ref().map_or(&none, |iterated| iterated.bind(py));
        ffi::call(Hooks::get(py)?.close_both.bind(py), [upstream, iterated]).map(drop)
    }
}

/// A reader's way into a stream.
pub(super) struct Opened {
    pub(super) stream: Arc<SharedStream>,
    pub(super) reader: Reader<Python3>,
    /// Whether it has to start the source.
    pub(super) leads: bool,
    /// Whether its request is counted.
    pub(super) counted: bool,
    pub(super) hash: u64,
}

/// How a stream is asked for.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) ttl: Option<Ttl>,
    pub(super) max_buffered: usize,
    /// Whether a task of the running loop appends the items, so that they end with that.
    pub(super) pumped_here: bool,
}

/// Joins a key's stream, or claims a new one.
pub(super) fn open(
    coalescer: &Coalescer,
    key: &Bound<'_, PyAny>,
    asked: Asked,
    event_loop: &Bound<'_, PyAny>,
) -> PyResult<Opened> {
    let py = key.py();
    let hash = key::hash(key)?;
    let in_task = !event_loop.is_none();
    let here = if in_task { event_loop.as_ptr().addr() } else { NO_LOOP };
    loop {
        let map = coalescer.streams();
        match map.find(hash, key.as_unbound(), |stream, _| Arc::clone(stream))? {
            Found::Hit(stream) => {
                if let Some(reader) = stream.log.join() {
                    return Ok(Opened { stream, reader, leads: false, counted: true, hash });
                }
                map.uncount_hit();
                let found = map.get(hash, key.as_unbound())?;
                let is_it = |flight: &Arc<Flight<Streams>>| {
                    flight.retained_at_all().is_some_and(|other| Arc::ptr_eq(other, &stream))
                };
                if let Some(flight) = found.filter(is_it) {
                    map.let_go(&flight);
                }
            }
            Found::Pending(flight) => {
                let inside = if in_task { Inside::of_task(py)? } else { Inside::of_thread(py)? };
                if inside.includes(&flight) {
                    return Err(coalescer.recursive_error(key)?);
                }
                // There is none if it has ended in this moment.
                let Some(stream) = flight.call() else { continue };
                let led_on = flight.lead().map_or(NO_LOOP, |(_, loop_id)| loop_id);
                let elsewhere = led_on != NO_LOOP && led_on != here;
                if elsewhere && Streams::call_is_lost(&stream) {
                    stream.break_off(None, false);
                    map.let_go(&flight);
                    continue;
                }
                let Some(reader) = stream.log.join() else {
                    map.let_go(&flight);
                    continue;
                };
                if elsewhere {
                    // It ends with its loop, and readers elsewhere have to be told.
                    stream.read_elsewhere.store(true, Ordering::Release);
                    map.watch(&flight);
                }
                return Ok(Opened { stream, reader, leads: false, counted: false, hash });
            }
            Found::Nothing => {
                let finishes = in_task && coalescer.finishes();
                // The leader pulls first, whoever comes before it has done so.
                let (log, reader) = Stream::begin(asked.max_buffered, finishes, true);
                let stream = Arc::new(SharedStream {
                    log,
                    lead: Slot::new(None),
                    call: OnceLock::new(),
                    ttl: asked.ttl,
                    upstream: Slot::new(None),
                    iterated: Slot::new(None),
                    task: Slot::new(None),
                    pump_ends: AtomicBool::new(false),
                    leader_reads: AtomicBool::new(true),
                    leaders_error: Slot::new(None),
                    read_elsewhere: AtomicBool::new(false),
                });
                coalescer.note(key);
                let loop_id = if asked.pumped_here { here } else { NO_LOOP };
                let origin = Origin { loop_id, thread: ffi::thread_number() };
                let call = Some(Arc::clone(&stream));
                if let Some(lead) = map.claim_for(hash, key.clone().unbind(), origin, call)? {
                    let _ = stream.call.set(Call::of(&lead));
                    stream.lead.put(lead);
                    return Ok(Opened { stream, reader, leads: true, counted: true, hash });
                }
            }
        }
    }
}

impl Family for Streams {
    type Key = Py<PyAny>;
    type Outcome = Arc<SharedStream>;
    type Error = PyErr;
    type Task = Infallible;
    type Call = Arc<SharedStream>;

    fn wake_fan() -> usize {
        Python3::wake_fan()
    }

    fn same(stored: &Py<PyAny>, wanted: &Py<PyAny>) -> PyResult<bool> {
        ffi::same_key(stored, wanted)
    }

    fn wake_tasks(_: Vec<Arc<Waiter<Self>>>) {}

    fn task_is_lost(task: &Infallible) -> bool {
        match *task {}
    }

    fn share_call(call: &Arc<SharedStream>) -> Arc<SharedStream> {
        Arc::clone(call)
    }

    // Readers have no seats in the flight: it is the last of them that closes the stream.
    fn cancel_call(_: Arc<SharedStream>) {}

    fn call_is_lost(call: &Arc<SharedStream>) -> bool {
        call.leader().is_some_and(|task| Python3::call_is_lost(&task))
    }

    fn is_needed_elsewhere(call: &Arc<SharedStream>) -> bool {
        call.read_elsewhere.load(Ordering::Acquire)
    }

    fn call_lost(call: Arc<SharedStream>) {
        call.break_off(None, false);
    }

    fn report_over_age(name: Option<&str>, key: &Py<PyAny>, age: Duration) {
        Python3::report_over_age(name, key, age);
    }
}
