//! What tasks of event loops hold: tickets for callers, tokens for calls, links for what a call starts.

use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyWeakrefReference;

use super::coalescer::Coalescer;
use super::family::{Outcome, Python3, TaskWaiter};
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
    place: Slot<Arc<Place<Python3>>>,
    lead: Slot<Lead<Python3>>,
    loop_id: usize,
    future: Option<Py<PyAny>>,
}

impl Ticket {
    pub(super) fn leading(lead: Lead<Python3>, loop_id: usize) -> Self {
        let place = Arc::new(lead.seat_caller(loop_id));
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
            place: Slot::new(Some(Arc::new(place))),
            lead: Slot::new(None),
            loop_id,
            future: Some(future.unbind()),
        }))
    }

    fn place(&self) -> PyResult<Arc<Place<Python3>>> {
        self.lock_place().ok_or_else(|| PyRuntimeError::new_err("the ticket's flight has been left"))
    }

    fn lock_place(&self) -> Option<Arc<Place<Python3>>> {
        self.place.lock().clone()
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
        Ok(self.place()?.wait_with(TaskWaiter { event_loop, future }))
    }

    /// The outcome for this caller. The ticket itself when it has to lead now, or (with `leads` false) to ask again.
    fn outcome<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let place = this.place()?;
        match place.standing() {
            Standing::Landed => {
                if this.future.is_some() {
                    place.count_joined();
                }
                let shared = place.outcome().map(|outcome| outcome.share(py));
                drop(place);
                drop(this.place.take());
                match shared {
                    Some(shared) => shared.into_result(),
                    None => Ok(slf.clone().into_any()),
                }
            }
            Standing::Offered => {
                if let Some(lead) = place.take_lead() {
                    this.place.put(Arc::new(lead.seat_caller(this.loop_id)));
                    this.lead.put(lead);
                }
                Ok(slf.clone().into_any())
            }
            Standing::Private | Standing::Cancelled => Err(cancelled(py)?),
            Standing::Waiting | Standing::Withdrawn => {
                drop(place);
                drop(this.place.take());
                Ok(slf.clone().into_any())
            }
        }
    }

    /// Gives up the place; the last one to go cancels the call.
    fn leave(&self) {
        drop(self.lead.take());
        drop(self.place.take());
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
        let link = self.lead.lock().as_ref().map(|lead| (Arc::downgrade(lead.flight()), lead.epoch()));
        let Some((flight, epoch)) = link else { return Ok(()) };
        let current = Link::variable(py)?;
        let parent = current.call_method0(intern!(py, "get"))?;
        let parent = if parent.is_none() { None } else { Some(parent.cast::<Link>()?.clone().unbind()) };
        current.call_method1(intern!(py, "set"), (Bound::new(py, Link { flight, epoch, parent })?,))?;
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
    fn complete(&self, value: Py<PyAny>) -> PyResult<()> {
        self.take()?.complete(Outcome::Value(value), self.coalescer.get().ttl.nanos, false);
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
}

/// In the context of a call's task and of all that it starts: which flight it computes, and for whom.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Link {
    flight: Weak<Flight<Python3>>,
    epoch: u32,
    parent: Option<Py<Link>>,
}

impl Link {
    fn variable(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
        static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let current = CURRENT.get_or_try_init(py, || {
            let kwargs = pyo3::types::PyDict::new(py);
            kwargs.set_item("default", py.None())?;
            let class = py.import("contextvars")?.getattr("ContextVar")?;
            class.call(("llm_batch_coalesce_call",), Some(&kwargs)).map(Bound::unbind)
        })?;
        Ok(current.bind(py))
    }

    /// Whether the current context belongs to the call that computes this flight.
    pub(super) fn is_current(py: Python<'_>, flight: &Arc<Flight<Python3>>) -> PyResult<bool> {
        let innermost = Self::variable(py)?.call_method0(intern!(py, "get"))?;
        if innermost.is_none() {
            return Ok(false);
        }
        let mut link = Some(innermost.cast::<Link>()?.get());
        let wanted = Arc::as_ptr(flight);
        while let Some(at) = link {
            if at.flight.as_ptr() == wanted && flight.epoch() == Some(at.epoch) {
                return Ok(true);
            }
            link = at.parent.as_ref().map(Py::get);
        }
        Ok(false)
    }
}
