//! Which calls the present caller is part of: those that its thread leads, and those that its context names.

use std::cell::RefCell;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use super::ffi;
use crate::circle::{Source, Target};
use crate::family::Family;
use crate::flight::Flight;
use crate::lead::Lead;
use crate::sync::{Arc, Weak};

/// A call: its flight, and the number of its lead.
#[derive(Clone)]
pub(super) struct Call {
    flight: Weak<dyn Target>,
    epoch: u32,
}

impl Call {
    pub(super) fn of<F: Family>(lead: &Lead<F>) -> Self {
        let flight: Arc<dyn Target> = Arc::clone(lead.flight()) as Arc<dyn Target>;
        Self { flight: Arc::downgrade(&flight), epoch: lead.epoch() }
    }

    fn address(&self) -> usize {
        self.flight.as_ptr().addr()
    }

    /// Its flight, if this is its present call.
    pub(super) fn under_way(&self) -> Option<Arc<dyn Target>> {
        self.flight.upgrade().filter(|flight| flight.epoch() == Some(self.epoch))
    }
}

thread_local! {
    /// The calls that this thread leads at the moment, outermost first.
    static LED: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
}

/// Notes that this thread leads a call, as long as it lives.
pub(super) struct Led {
    flight: usize,
    epoch: u32,
}

impl Led {
    pub(super) fn begin(call: Call) -> Self {
        let led = Self { flight: call.address(), epoch: call.epoch };
        LED.with_borrow_mut(|calls| calls.push(call));
        led
    }
}

impl Drop for Led {
    fn drop(&mut self) {
        let own = |call: &Call| call.address() == self.flight && call.epoch == self.epoch;
        // The last one, but for greenlets, whose calls end in any order.
        LED.with_borrow_mut(|led| led.iter().rposition(own).map(|place| led.remove(place)));
    }
}

/// The calls that a caller is part of.
pub(super) struct Inside(Vec<Call>);

impl Inside {
    /// Of a caller that asks and waits in this thread.
    pub(super) fn of_thread(py: Python<'_>) -> PyResult<Self> {
        let mut calls = LED.with_borrow(Clone::clone);
        if let Some((variable, within)) = Within::current(py)?
            && !is_inherited(variable, &within)?
        {
            calls.extend_from_slice(&within.get().calls);
        }
        Ok(Self(calls))
    }

    /// Of the task that runs in this thread.
    pub(super) fn of_task(py: Python<'_>) -> PyResult<Self> {
        let mut calls = LED.with_borrow(Clone::clone);
        if let Some((_, within)) = Within::current(py)? {
            calls.extend_from_slice(&within.get().calls);
        }
        Ok(Self(calls))
    }

    /// Whether the caller is part of no call.
    pub(super) fn is_outside(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the caller is part of the call that computes this flight.
    pub(super) fn includes<F: Family>(&self, flight: &Arc<Flight<F>>) -> bool {
        let wanted = Arc::as_ptr(flight).addr();
        self.0.iter().any(|call| call.address() == wanted && flight.epoch() == Some(call.epoch))
    }

    /// What will have to wait if the caller does.
    pub(super) fn sources(&self) -> Vec<Source> {
        let under_way = self.0.iter().filter(|call| call.under_way().is_some());
        under_way.map(|call| Source::Call(call.address(), call.epoch)).collect()
    }
}

/// In the context of a call's task and of all that it starts: the calls that it is part of.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Within {
    calls: Vec<Call>,
}

static VARIABLE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

impl Within {
    /// Marks the current context as that of these calls.
    pub(super) fn enter(py: Python<'_>, calls: impl IntoIterator<Item = Call>) -> PyResult<()> {
        let variable = VARIABLE.get_or_try_init(py, || new_variable(py, "llm_batch_coalesce_calls"))?;
        // Calls that are over are left out: a job that starts itself again would else gather them for ever.
        let outer = Inside::of_task(py)?.0.into_iter().filter(|call| call.under_way().is_some());
        let within = Self { calls: outer.chain(calls).collect() };
        ffi::call_method(intern!(py, "set"), [variable.bind(py), Bound::new(py, within)?.as_any()])?;
        Ok(())
    }

    /// What the current context names, and the variable that it is in.
    fn current(py: Python<'_>) -> PyResult<Option<(&Bound<'_, PyAny>, Bound<'_, Self>)>> {
        // Before the first call of a task there is no such variable.
        let Some(variable) = VARIABLE.get(py) else { return Ok(None) };
        let variable = variable.bind(py);
        match ffi::context_value(variable)? {
            Some(within) => Ok(Some((variable, within.cast_into::<Self>()?))),
            None => Ok(None),
        }
    }
}

/// Whether the value is that of the context in which this thread began, and the thread is in it. Threads of free-threaded
/// 3.14 begin in a copy of their starter's context; that does not make them part of its call. One that runs a function in
/// a context, as `asyncio.to_thread` does, is.
fn is_inherited(variable: &Bound<'_, PyAny>, value: &Bound<'_, Within>) -> PyResult<bool> {
    static INHERITS: PyOnceLock<bool> = PyOnceLock::new();
    static PROBE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = variable.py();
    let inherits = INHERITS.get_or_try_init(py, || {
        let flag = py.import("sys")?.getattr("flags")?.getattr_opt("thread_inherit_context")?;
        flag.map_or(Ok(false), |flag| flag.is_truthy())
    })?;
    if !inherits {
        return Ok(false);
    }
    let thread = py.import("threading")?.getattr("current_thread")?;
    let Some(context) = ffi::call(&thread, [])?.getattr_opt("_context")? else { return Ok(false) };
    let is_there =
        |variable| ffi::call_method(intern!(py, "get"), [&context, variable]).map(|there| there.is(value));
    if context.is_none() || !is_there(variable)? {
        return Ok(false);
    }
    // A pool's worker that was started in the call has the same value, whatever it runs. Contexts do not tell whether
    // they are the same, but what is set in one shows there only.
    let probe = PROBE.get_or_try_init(py, || new_variable(py, "llm_batch_coalesce_probe"))?.bind(py);
    let token = ffi::call_method(intern!(py, "set"), [probe, value.as_any()])?;
    let seen = is_there(probe);
    ffi::call_method(intern!(py, "reset"), [probe, &token])?;
    seen
}

fn new_variable(py: Python<'_>, name: &str) -> PyResult<Py<PyAny>> {
    py.import("contextvars")?.getattr("ContextVar")?.call1((name,)).map(Bound::unbind)
}
