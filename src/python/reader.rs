//! The two ends of a shared stream, as Python holds them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyRuntimeError, PyStopIteration};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;

use super::coalescer::Coalescer;
use super::family::{Shared, TaskWaiter, check_interrupt, running_loop, undisturbed};
use super::ffi::{self, Held};
use super::hooks::Hooks;
use super::inside::{Inside, Led};
use super::options::{self, Patience};
use super::signal::Signal;
use super::slot::Slot;
use super::source::{StreamSource, end_with};
use super::streams::{self, Asked, SharedStream, Streams};
use super::thread::wait;
use crate::circle::{BlockedLoop, Nested, Source};
use crate::map::Map;
use crate::stream::{Reader, Turn};

/// A reader of a shared stream. Dropping it leaves the stream.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct StreamReader {
    coalescer: Py<Coalescer>,
    key: Py<PyAny>,
    hash: u64,
    stream: Arc<SharedStream>,
    reader: Reader<super::family::Python3>,
    leads: bool,
    /// What a reader that leads starts the source with; once.
    source: Slot<()>,
    /// Whether it is to pull, and has not begun to.
    duty: AtomicBool,
    /// Whether its request is counted, or is counted when it asks again.
    counted: AtomicBool,
    nested: Slot<Nested>,
    /// What its task waits with, each time anew.
    signal: OnceLock<Py<Signal>>,
}

impl StreamReader {
    pub(super) fn open(
        coalescer: &Bound<'_, Coalescer>,
        key: &Bound<'_, PyAny>,
        asked: Asked,
    ) -> PyResult<Self> {
        let event_loop = running_loop(key.py())?;
        let opened = streams::open(coalescer.get(), key, asked, &event_loop)?;
        Ok(Self {
            coalescer: coalescer.clone().unbind(),
            key: key.clone().unbind(),
            hash: opened.hash,
            stream: opened.stream,
            reader: opened.reader,
            leads: opened.leads,
            source: Slot::new(opened.leads.then_some(())),
            duty: AtomicBool::new(false),
            counted: AtomicBool::new(opened.counted),
            nested: Slot::new(None),
            signal: OnceLock::new(),
        })
    }

    /// What there is to do for this reader. Raises the error that the stream ended with.
    pub(super) fn turn<'py>(&self, py: Python<'py>) -> PyResult<Turn<Bound<'py, PyAny>>> {
        drop(self.nested.take());
        let turn = self.reader.take(|outcome| outcome.share(py));
        match turn {
            Turn::Wait => {}
            Turn::Pull => self.duty.store(true, Ordering::Release),
            // It will be counted when it asks again.
            Turn::StartOver => self.counted.store(true, Ordering::Relaxed),
            _ => self.count(Map::count_joined),
        }
        let over = !matches!(turn, Turn::Items(_) | Turn::Wait | Turn::Pull | Turn::Lagged(_));
        if over
            && self.leads
            && let Some(error) = self.stream.take_leaders_error()
        {
            return Err(PyErr::from_value(error.into_bound(py)));
        }
        Ok(match turn {
            Turn::Items(items) => {
                Turn::Items(items.into_iter().map(Shared::into_result).collect::<PyResult<_>>()?)
            }
            Turn::Failed(error) => Turn::Failed(error.into_result()?),
            Turn::Broken(Some(error)) => Turn::Broken(Some(error.into_result()?)),
            Turn::Broken(None) => {
                let name = self.coalescer.get().name().into_pyobject(py)?;
                let hook = Hooks::get(py)?.lost_stream_error.bind(py);
                return Err(PyErr::from_value(ffi::call(hook, [self.key.bind(py), &name])?));
            }
            Turn::Lagged(missed) => {
                let name = self.coalescer.get().name().into_pyobject(py)?;
                let missed = missed.into_pyobject(py)?;
                let hook = Hooks::get(py)?.stream_lag_error.bind(py);
                return Err(PyErr::from_value(ffi::call(hook, [self.key.bind(py), &name, &missed])?));
            }
            Turn::Wait => Turn::Wait,
            Turn::Pull => Turn::Pull,
            Turn::Finished => Turn::Finished,
            Turn::StartOver => Turn::StartOver,
        })
    }

    /// A future for the next wait of the task that reads.
    fn signal<'py>(&self, event_loop: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = event_loop.py();
        if let Some(signal) = self.signal.get() {
            signal.get().rearm();
            return Ok(signal.bind(py).clone().into_any());
        }
        let signal = Bound::new(py, Signal::new(event_loop))?;
        let _ = self.signal.set(signal.clone().unbind());
        Ok(signal.into_any())
    }

    /// Shows what it holds, for the garbage collector.
    pub(super) fn show(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.coalescer)?;
        visit.call(&self.key)?;
        visit.call(self.signal.get())
    }

    fn count(&self, counter: fn(&Map<Streams>, u64)) {
        // Most have been counted with their first item.
        if !self.counted.load(Ordering::Relaxed) && !self.counted.swap(true, Ordering::Relaxed) {
            counter(self.coalescer.get().streams(), self.hash);
        }
    }

    /// Blocks this thread until there is something to do for this reader. False if `until` has passed before.
    pub(super) fn block(&self, py: Python<'_>, until: Option<Instant>) -> PyResult<bool> {
        let coalescer = self.coalescer.get();
        let key = self.key.bind(py);
        let event_loop = running_loop(py)?;
        let blocked = (!event_loop.is_none()).then(|| event_loop.as_ptr().addr());
        // There is no target any more when the stream is just ending, which is waited for all the same.
        let nested = match self.stream.under_way() {
            Some(target) => {
                if blocked.is_some_and(|loop_id| target.sources().contains(&Source::Loop(loop_id))) {
                    return Err(coalescer.deadlock_error(key)?);
                }
                let inside = Inside::of_thread(py)?;
                coalescer.begin_nested(&inside, blocked.as_slice(), &target, key, until.is_none())?
            }
            None => None,
        };
        let _blocked = blocked.map(BlockedLoop::begin);
        let Some(waiting) = self.reader.wait_here() else { return Ok(true) };
        let woken = wait(py, until, |limit| waiting.wait(limit).then_some(()));
        // Passes the baton on before anything that can fail.
        drop((waiting, nested));
        Ok(woken?.is_some())
    }

    /// Whether it is this reader's duty to begin the stream; once.
    pub(super) fn begins(&self) -> bool {
        self.source.take().is_some()
    }

    /// Whether it is this reader's duty to pull; once.
    pub(super) fn takes_duty(&self) -> bool {
        self.duty.swap(false, Ordering::AcqRel)
    }

    /// Pulls the next item for all readers, which is this one's duty; `fn` makes the upstream if there is none yet.
    pub(super) fn pull_next(&self, r#fn: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = r#fn.py();
        let duty = Duty(&self.stream);
        let _led = self.stream.call().map(Led::begin);
        match self.next_item(r#fn) {
            Ok(Some(item)) => {
                if !self.stream.append(item, true)
                    && let Some(upstream) = self.stream.upstream.take()
                {
                    // The last reader has left meanwhile.
                    self.stream.close_upstream(upstream.bind(py))?;
                }
            }
            Ok(None) => {
                self.stream.finish(self.stream.ttl.unwrap_or(self.coalescer.get().ttl()));
            }
            Err(error) => {
                let exception = error.into_value(py).into_bound(py).into_any();
                end_with(self.coalescer.get(), &self.stream, &exception, None)?;
                std::mem::drop(duty);
                return Err(PyErr::from_value(exception));
            }
        }
        duty.done();
        check_interrupt()
    }

    fn next_item(&self, r#fn: &Bound<'_, PyAny>) -> PyResult<Option<Py<PyAny>>> {
        let py = r#fn.py();
        let upstream: Held = if let Some(upstream) = self.stream.upstream.take() {
            upstream
        } else {
            let begun = ffi::call(Hooks::get(py)?.iterate.bind(py), [r#fn])?;
            let (upstream, iterated): (Bound<'_, PyAny>, Bound<'_, PyAny>) = begun.extract()?;
            self.coalescer.get().note(&upstream);
            if !iterated.is(&upstream) {
                self.coalescer.get().note(&iterated);
                self.stream.iterated.put(iterated.into());
            }
            upstream.into()
        };
        match ffi::call_method(intern!(py, "__next__"), [upstream.bind(py)]) {
            Ok(item) => {
                self.coalescer.get().note(&item);
                self.stream.upstream.put(upstream);
                Ok(Some(item.unbind()))
            }
            Err(error) if error.is_instance_of::<PyStopIteration>(py) => Ok(None),
            Err(error) => {
                if let Err(unclosed) = self.stream.close_upstream(upstream.bind(py)) {
                    unclosed.write_unraisable(py, Some(upstream.bind(py)));
                }
                Err(error)
            }
        }
    }

    pub(super) fn leave_now(&self, py: Python<'_>) -> PyResult<()> {
        drop(self.nested.take());
        if self.leads {
            self.stream.leader_leaves();
        }
        let last = self.reader.leave();
        if self.begins() {
            // Nobody will ever pull.
            self.stream.break_off(None, false);
        }
        if self.takes_duty() {
            self.stream.log.release();
        }
        self.count(Map::count_cancelled);
        if last { self.stream.close(py) } else { Ok(()) }
    }
}

/// The duty to pull. Whoever drops it undone leaves the others a broken stream, and not one that they wait for.
struct Duty<'a>(&'a SharedStream);

impl Duty<'_> {
    #[expect(clippy::mem_forget, reason = "its drop is for the other case")]
    fn done(self) {
        std::mem::forget(self);
    }
}

impl Drop for Duty<'_> {
    fn drop(&mut self) {
        self.0.break_off(None, false);
    }
}

#[pymethods]
impl StreamReader {
    /// Whether this reader has to start the source, or to pull the first item.
    #[getter]
    fn leads(&self) -> bool {
        self.leads
    }

    /// The source, for the reader that leads; once.
    fn source(&self, py: Python<'_>) -> PyResult<StreamSource> {
        let taken = || PyRuntimeError::new_err("only a reader that leads has a source, and only one");
        self.source.take().ok_or_else(taken)?;
        Ok(StreamSource { coalescer: self.coalescer.clone_ref(py), stream: Arc::clone(&self.stream) })
    }

    /// The next items; or, as a word, what there is to do instead. A task gets a future in the place of "wait", which is
    /// done when it is to come again.
    #[pyo3(signature = (event_loop = None, /))]
    fn take<'py>(
        &self,
        py: Python<'py>,
        event_loop: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        loop {
            let word = match self.turn(py)? {
                Turn::Items(items) => return Ok(PyList::new(py, items)?.into_any()),
                Turn::Wait => {
                    if let Some(event_loop) = event_loop {
                        let signal = self.signal(event_loop)?;
                        if self.wait_with(event_loop, signal.clone().unbind())? {
                            return Ok(signal);
                        }
                        continue;
                    }
                    intern!(py, "wait")
                }
                Turn::Pull => intern!(py, "pull"),
                Turn::StartOver => intern!(py, "again"),
                Turn::Finished | Turn::Failed(_) | Turn::Broken(_) | Turn::Lagged(_) => intern!(py, "end"),
            };
            return Ok(word.clone().into_any());
        }
    }

    /// Blocks this thread until there is something to do. False when `timeout` seconds have passed before.
    #[pyo3(signature = (timeout = None, /))]
    fn wait(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let limit = match options::timeout(timeout)? {
            Patience::Endless => None,
            Patience::None => Some(Duration::ZERO),
            Patience::Limited(limit) => Some(limit),
        };
        self.block(py, limit.and_then(|limit| Instant::now().checked_add(limit)))
    }

    /// Lets a task wait with this future. False if there is something to do already.
    fn wait_with(&self, event_loop: &Bound<'_, PyAny>, future: Py<PyAny>) -> PyResult<bool> {
        let (py, coalescer) = (event_loop.py(), self.coalescer.get());
        let inside = Inside::of_task(py)?;
        let nested = if inside.is_outside() {
            None
        } else {
            let target = self.stream.under_way();
            target.map_or(Ok(None), |target| {
                coalescer.begin_nested(&inside, &[], &target, self.key.bind(py), true)
            })?
        };
        coalescer.note(event_loop);
        let task = TaskWaiter { event_loop: event_loop.clone().unbind(), future };
        let waits = self.reader.await_more(event_loop.as_ptr().addr(), task);
        if let Some(nested) = nested.filter(|_| waits) {
            self.nested.put(nested);
        }
        Ok(waits)
    }

    /// Pulls the next item for all readers.
    fn pull(&self, r#fn: &Bound<'_, PyAny>) -> PyResult<()> {
        // A reader that has left in the meantime has given it back.
        if self.begins() || self.takes_duty() { self.pull_next(r#fn) } else { Ok(()) }
    }

    /// Leaves the stream; the last one to go closes it.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        self.leave_now(py)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.show(&visit)
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        let py = ffi::attached();
        undisturbed(py, || {
            if let Err(error) = self.leave_now(py) {
                error.write_unraisable(py, None);
            }
        });
    }
}
