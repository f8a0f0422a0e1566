//! What tasks of event loops hold: tickets for callers, tokens for calls, and in their contexts the calls themselves.

use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyWeakrefReference;

use super::coalescer::Coalescer;
use super::family::{Python3, Shared, TaskWaiter};
use super::ffi;
use crate::flight::{Flight, Standing};
use crate::map::{Lead, Map, Place};
use crate::sync::Arc;
use crate::waiter::Wakeup;

/// Moves a value in or out under a short lock; what comes out is dropped after it.
struct Slot<T>(Mutex<Option<T>>);

impl<T> Slot<T> {
    fn new(value: Option<T>) -> Self {
        Self(Mutex::new(value))
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<T> {
        self.lock().take()
    }

    fn put(&self, value: T) {
        let old = self.lock().replace(value);
        drop(old);
    }
}

/// A task's place in a flight that it does not find retained.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Ticket {
    place: Slot<Place<Python3>>,
    lead: Slot<Lead<Python3>>,
    loop_id: usize,
    future: Option<Py<PyAny>>,
}

impl Ticket {
    pub(super) fn leading(lead: Lead<Python3>, loop_id: usize) -> Self {
        let place = lead.seat_caller(loop_id);
        Self { place: Slot::new(Some(place)), lead: Slot::new(Some(lead)), loop_id, future: None }
    }

    /// `None` when the flight has ended meanwhile.
    pub(super) fn joining(
        map: &Arc<Map<Python3>>,
        flight: &Arc<Flight<Python3>>,
        event_loop: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Self>> {
        let py = event_loop.py();
        let future = event_loop.call_method0(intern!(py, "create_future"))?;
        let task = TaskWaiter { event_loop: event_loop.clone().unbind(), future: future.clone().unbind() };
        let loop_id = event_loop.as_ptr().addr();
        Ok(map.join(flight, loop_id, Wakeup::Task(task)).map(|place| Self {
            place: Slot::new(Some(place)),
            lead: Slot::new(None),
            loop_id,
            future: Some(future.unbind()),
        }))
    }

    fn take_place(&self) -> PyResult<Place<Python3>> {
        self.place.take().ok_or_else(|| PyRuntimeError::new_err("the ticket's flight has been left"))
    }
}

#[pymethods]
impl Ticket {
    /// Whether this task has to run the call.
    #[getter]
    fn leads(&self) -> bool {
        self.lead.lock().is_some()
    }

    /// Done when there is something to read; of a ticket that joined.
    #[getter]
    fn future<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.future.as_ref().map(|future| future.bind(py).clone())
    }

    /// The lead, for the call's own task; once.
    fn token(&self, coalescer: Py<Coalescer>) -> PyResult<Token> {
        let lead = self.lead.take().ok_or_else(|| PyRuntimeError::new_err("the ticket does not lead"))?;
        Ok(Token { lead: Slot::new(Some(lead)), coalescer })
    }

    /// Lets the leader's caller wait with this future. False when there is nothing to wait for any more.
    fn wait_with(&self, event_loop: Py<PyAny>, future: Py<PyAny>) -> PyResult<bool> {
        let place = self.take_place()?;
        let waits = place.wait_with(TaskWaiter { event_loop, future });
        self.place.put(place);
        Ok(waits)
    }

    /// The outcome for this caller. The ticket itself when it has to lead now, or (with `leads` false) to ask again.
    fn outcome<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let place = this.take_place()?;
        match place.standing() {
            Standing::Landed => {
                if !place.is_callers_own() {
                    place.count_joined();
                }
                let shared = place.outcome().map(|outcome| outcome.share(py));
                drop(place);
                shared.map_or_else(|| Ok(slf.clone().into_any()), Shared::into_result)
            }
            Standing::Offered => {
                if let Some(lead) = place.take_lead() {
                    this.place.put(lead.seat_caller(this.loop_id));
                    this.lead.put(lead);
                }
                Ok(slf.clone().into_any())
            }
            Standing::Private | Standing::Cancelled => Err(cancelled(py)?),
            Standing::Waiting | Standing::Withdrawn => Ok(slf.clone().into_any()),
        }
    }

    /// Gives up the place; the last one to go cancels the call.
    fn leave(&self) {
        drop(self.lead.take());
        drop(self.place.take());
    }

    // A ticket's waiter is its own, so what the waiter holds is visited here and nowhere else.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.future)?;
        // Nobody is stopped while holding the lock; if it is held all the same, the next collection will do.
        let Ok(place) = self.place.0.try_lock() else { return Ok(()) };
        match place.as_ref().and_then(|place| place.task()) {
            Some(task) => {
                visit.call(&task.event_loop)?;
                visit.call(&task.future)
            }
            None => Ok(()),
        }
    }
}

fn cancelled(py: Python<'_>) -> PyResult<PyErr> {
    static CANCELLED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    Ok(PyErr::from_value(CANCELLED.import(py, "asyncio", "CancelledError")?.call0()?))
}

/// The lead of a flight whose call runs in a task. Dropping it hands the flight over.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Token {
    lead: Slot<Lead<Python3>>,
    coalescer: Py<Coalescer>,
}

impl Token {
    fn take(&self) -> PyResult<Lead<Python3>> {
        self.lead.take().ok_or_else(|| PyRuntimeError::new_err("the call is over already"))
    }
}

#[pymethods]
impl Token {
    /// Marks the current context as that of this call.
    fn enter(&self, py: Python<'_>) -> PyResult<()> {
        let own = self.lead.lock().as_ref().map(|lead| (Arc::downgrade(lead.flight()), lead.epoch()));
        let current = Within::variable(py)?;
        let outer = ffi::context_value(current)?;
        // Calls that are over are left out: a job that starts itself again would else gather them for ever.
        let outer = if outer.is_none() { Vec::new() } else { outer.cast::<Within>()?.get().under_way() };
        let within = Within { calls: outer.into_iter().chain(own).collect() };
        current.call_method1(intern!(py, "set"), (Bound::new(py, within)?,))?;
        Ok(())
    }

    /// Tells which task runs the call.
    fn led_by(&self, task: &Bound<'_, PyAny>) -> PyResult<()> {
        let call = PyWeakrefReference::new(task)?.into_any().unbind();
        let lead = self.lead.take();
        if let Some(lead) = lead {
            lead.led_by(call);
            self.lead.put(lead);
        }
        Ok(())
    }

    /// Shares the call's value.
    fn complete(&self, value: Bound<'_, PyAny>) -> PyResult<()> {
        self.coalescer.get().complete(self.take()?, value);
        Ok(())
    }

    /// Shares the call's error, if it is one to share. False when its own caller is gone and nobody else has it.
    fn fail(&self, py: Python<'_>, error: &Bound<'_, PyAny>) -> PyResult<bool> {
        Coalescer::settle_error(self.coalescer.bind(py), self.take()?, error)
    }

    /// Ends the call without an outcome, since its task was cancelled: with its loop it takes the waiters there.
    fn lose_loop(&self) -> PyResult<()> {
        self.take()?.lose_loop();
        Ok(())
    }

    /// For the task to call when it is done: one that was cancelled before it began has not ended its flight.
    #[pyo3(signature = (task))]
    fn task_done(&self, task: &Bound<'_, PyAny>) {
        let _ = task;
        if let Some(lead) = self.lead.take() {
            lead.lose_loop();
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.coalescer)
    }
}

/// In the context of a call's task and of all that it starts: the calls that it is part of, each a flight and the
/// number of its lead.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Within {
    calls: Vec<(Weak<Flight<Python3>>, u32)>,
}

impl Within {
    fn variable(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
        static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let current = CURRENT.get_or_try_init(py, || {
            let kwargs = pyo3::types::PyDict::new(py);
            kwargs.set_item("default", py.None())?;
            let class = py.import("contextvars")?.getattr("ContextVar")?;
            class.call(("llm_batch_coalesce_calls",), Some(&kwargs)).map(Bound::unbind)
        })?;
        Ok(current.bind(py))
    }

    fn under_way(&self) -> Vec<(Weak<Flight<Python3>>, u32)> {
        let under_way = |(flight, epoch): &&(Weak<Flight<Python3>>, u32)| {
            flight.upgrade().and_then(|flight| flight.epoch()) == Some(*epoch)
        };
        self.calls.iter().filter(under_way).cloned().collect()
    }

    /// Whether the current context belongs to the call that computes this flight.
    pub(super) fn includes(py: Python<'_>, flight: &Arc<Flight<Python3>>) -> PyResult<bool> {
        let current = ffi::context_value(Self::variable(py)?)?;
        if current.is_none() {
            return Ok(false);
        }
        let wanted = Arc::as_ptr(flight);
        let calls = &current.cast::<Within>()?.get().calls;
        Ok(calls.iter().any(|(own, epoch)| own.as_ptr() == wanted && flight.epoch() == Some(*epoch)))
    }
}
