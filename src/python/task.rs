//! What tasks of event loops hold: tickets for callers, tokens for calls.

use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyWeakrefReference};

use super::answer::{Answer, Request, Role};
use super::coalescer::Coalescer;
use super::errors::{cancelled_error, timeout_error};
use super::family::{Python3, TaskCall, TaskWaiter, check_interrupt};
use super::ffi;
use super::inside::{Call, Inside, Within};
use super::options::{Patience, Ttl};
use super::signal::Signal;
use super::slot::Slot;
use crate::circle::{Nested, Target};
use crate::flight::Flight;
use crate::lead::{Lead, Place};
use crate::map::Map;
use crate::seat::Standing;
use crate::sync::Arc;
use crate::waiter::Wakeup;

/// A task's place in a flight that it does not find retained.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Ticket {
    place: Slot<Place<Python3>>,
    lead: Slot<Lead<Python3>>,
    nested: Slot<Nested>,
    loop_id: usize,
    future: Option<Py<PyAny>>,
    finishes: bool,
    request: Request,
    /// Whether the store served the caller that leads; shared with its token.
    stored: Arc<AtomicBool>,
}

impl Ticket {
    pub(super) fn leading(lead: Lead<Python3>, loop_id: usize, finishes: bool, request: Request) -> Self {
        let place = lead.seat_caller(loop_id, finishes);
        Self {
            place: Slot::new(Some(place)),
            lead: Slot::new(Some(lead)),
            nested: Slot::new(None),
            loop_id,
            future: None,
            finishes,
            request,
            stored: Arc::default(),
        }
    }

    /// `None` when the flight has ended meanwhile.
    pub(super) fn joining(
        coalescer: &Coalescer,
        map: &Arc<Map<Python3>>,
        flight: &Arc<Flight<Python3>>,
        event_loop: &Bound<'_, PyAny>,
        nested: Option<Nested>,
        request: Request,
        busy: bool,
    ) -> PyResult<Option<Self>> {
        let future = Bound::new(event_loop.py(), Signal::new(event_loop))?.into_any();
        let task = TaskWaiter { event_loop: event_loop.clone().unbind(), future: future.clone().unbind() };
        let loop_id = event_loop.as_ptr().addr();
        let join = if busy { Map::join_busy } else { Map::join };
        Ok(join(map, flight, loop_id, Wakeup::Task(task)).map(|place| Self {
            place: Slot::new(Some(place)),
            lead: Slot::new(None),
            nested: Slot::new(nested),
            loop_id,
            future: Some(future.unbind()),
            finishes: coalescer.finishes(),
            request,
            stored: Arc::default(),
        }))
    }

    /// Its caller was refused, and is no request.
    pub(super) fn refuse(&self) {
        if let Some(place) = self.place.take() {
            place.ask_again();
        }
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

    /// How many seconds its caller waits at most.
    #[getter]
    fn limit(&self) -> Option<f64> {
        match self.request.patience {
            Patience::Limited(limit) => Some(limit.as_secs_f64()),
            Patience::Endless | Patience::None => None,
        }
    }

    /// The lead, for the call's own task; once.
    fn token(&self, coalescer: Py<Coalescer>) -> PyResult<Token> {
        let lead = self.lead.take().ok_or_else(|| PyRuntimeError::new_err("the ticket does not lead"))?;
        let stored = Arc::clone(&self.stored);
        Ok(Token { lead: Slot::new(Some(lead)), coalescer, ttl: self.request.ttl, stored })
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
        drop(this.nested.take());
        let place = this.take_place()?;
        match place.standing() {
            Standing::Landed => {
                let role = match place.is_callers_own() {
                    false => Role::Waiter,
                    // Relaxed: it is read on the loop that has written it.
                    true if this.stored.load(Ordering::Relaxed) => Role::Hit,
                    true => Role::Leader,
                };
                let answer = place.outcome().map(|outcome| Answer::of(py, outcome, place.flight(), role));
                if answer.is_some() {
                    place.count_joined();
                } else {
                    place.ask_again();
                }
                drop(place);
                answer.map_or_else(
                    || Ok(slf.clone().into_any()),
                    |answer| answer.into_result(py, this.request.detailed),
                )
            }
            Standing::Offered => {
                let lead = place.take_lead(ffi::thread_number());
                match lead {
                    Some(lead) => {
                        this.place.put(lead.seat_caller(this.loop_id, this.finishes));
                        this.lead.put(lead);
                    }
                    None => place.ask_again(),
                }
                Ok(slf.clone().into_any())
            }
            Standing::Private | Standing::Cancelled => {
                let key = place.flight().key().bind(py).clone();
                let error = cancelled_error(place.map(), &key, true)?;
                drop(place);
                Err(error)
            }
            Standing::Waiting | Standing::Withdrawn => {
                place.ask_again();
                Ok(slf.clone().into_any())
            }
        }
    }

    /// From now on it can be offered the lead. Raises if the wait would never end.
    fn begin_waiting(&self, coalescer: &Bound<'_, Coalescer>) -> PyResult<()> {
        let place = self.take_place()?;
        place.begin_waiting();
        let flight = Arc::clone(place.flight());
        self.place.put(place);
        let py = coalescer.py();
        let (inside, endless) = (Inside::of_task(py)?, self.request.patience == Patience::Endless);
        let (key, target) = (flight.key().bind(py), Arc::clone(&flight) as Arc<dyn Target>);
        let nested = coalescer.get().begin_nested(&inside, &[], &target, key, endless);
        if let Some(nested) = nested.inspect_err(|_| self.refuse())? {
            self.nested.put(nested);
        }
        Ok(())
    }

    /// Gives up the place; the last one to go cancels the call.
    fn leave(&self) -> PyResult<()> {
        drop(self.nested.take());
        drop(self.lead.take());
        drop(self.place.take());
        check_interrupt()
    }

    /// Gives up the place with a `TimeoutError`, unless there is something to read in this very moment.
    fn time_out(&self, timeout: &Bound<'_, PyAny>) -> PyResult<()> {
        let place = self.take_place()?;
        if place.standing() != Standing::Waiting {
            self.place.put(place);
            return Ok(());
        }
        drop(self.nested.take());
        place.count_timeout();
        let key = place.flight().key().bind(timeout.py()).clone();
        let error = timeout_error(place.map(), &key, timeout)?;
        drop(place);
        check_interrupt()?;
        Err(error)
    }

    // While a flight is under way, it is the flight that holds what wakes the waiter.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.future)?;
        let Some(place) = self.place.try_lock() else { return Ok(()) };
        match place.as_ref().and_then(|place| place.own_task()) {
            Some(task) => {
                visit.call(&task.event_loop)?;
                visit.call(&task.future)
            }
            None => Ok(()),
        }
    }
}

/// The lead of a flight whose call runs in a task. Dropping it hands the flight over.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Token {
    lead: Slot<Lead<Python3>>,
    coalescer: Py<Coalescer>,
    ttl: Option<Ttl>,
    stored: Arc<AtomicBool>,
}

impl Token {
    fn call(&self) -> PyResult<Call> {
        let lead = self.take()?;
        let call = Call::of(&lead);
        self.lead.put(lead);
        Ok(call)
    }

    fn take(&self) -> PyResult<Lead<Python3>> {
        self.lead.take().ok_or_else(|| PyRuntimeError::new_err("the call is over already"))
    }
}

#[pymethods]
impl Token {
    /// Marks the current context as that of this call.
    fn enter(&self, py: Python<'_>) -> PyResult<()> {
        Within::enter(py, [self.call()?])
    }

    /// The same for a call for many keys.
    #[staticmethod]
    fn enter_all(tokens: &Bound<'_, PyList>) -> PyResult<()> {
        let call = |token: Bound<'_, PyAny>| token.cast::<Self>()?.get().call();
        let calls = tokens.iter().map(call).collect::<PyResult<Vec<_>>>()?;
        Within::enter(tokens.py(), calls)
    }

    /// Tells which task runs the call, and whose call it is.
    fn led_by(&self, task: &Bound<'_, PyAny>, caller: &Bound<'_, PyAny>) -> PyResult<()> {
        let weakly = |task| PyWeakrefReference::new(task).map(|weak| weak.into_any().unbind());
        let call = TaskCall { task: weakly(task)?, caller: weakly(caller)? };
        let lead = self.lead.take();
        if let Some(lead) = lead {
            lead.led_by(call);
            self.lead.put(lead);
        }
        Ok(())
    }

    /// Shares the call's value, and returns what the callers get.
    fn complete<'py>(&self, value: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.coalescer.get().complete(self.take()?, value, self.ttl)
    }

    /// How long a result of the call will be retained, in seconds; 0 for not at all.
    fn retained_for(&self, value: &Bound<'_, PyAny>) -> PyResult<f64> {
        let lead = self.take()?;
        let seconds = self.coalescer.get().retained_for(&lead, value, self.ttl);
        self.lead.put(lead);
        Ok(seconds)
    }

    /// Counts the caller as served by a store.
    fn count_store_hit(&self) -> PyResult<()> {
        let lead = self.take()?;
        lead.count_store_hit();
        self.stored.store(true, Ordering::Relaxed);
        self.lead.put(lead);
        Ok(())
    }

    /// Shares the call's error, if it is one to share. False when its own caller is gone and nobody else has it.
    fn fail(&self, error: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.coalescer.get().settle_error(self.take()?, error, self.ttl)
    }

    /// Ends the call without an outcome, since its task was cancelled: with its loop it takes the waiters there.
    fn lose_loop(&self) -> PyResult<()> {
        self.take()?.lose_loop();
        check_interrupt()
    }

    /// For the task to call when it is done: one that was cancelled before it began has not ended its flight.
    #[pyo3(signature = (task))]
    fn task_done(&self, task: &Bound<'_, PyAny>) -> PyResult<()> {
        let _ = task;
        if let Some(lead) = self.lead.take() {
            lead.lose_loop();
        }
        check_interrupt()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.coalescer)
    }
}
