//! The base classes of the public coalescers.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::family::{Outcome, Python3, Shared, running_loop};
use super::hooks::Hooks;
use super::options::{self, Ttl};
use super::task::{Ticket, Within};
use super::{ffi, key};
use crate::flight::{Flight, Standing};
use crate::map::{Found, Lead, Map, Place};
use crate::sync::Arc;
use crate::waiter::{LoopId, NO_LOOP, Wakeup};

/// What both kinds of coalescer have: the map, the options, and the questions about them.
#[pyclass(frozen, subclass, weakref, module = "llm_batch_coalesce._core")]
pub(super) struct Coalescer {
    pub(super) map: Arc<Map<Python3>>,
    pub(super) ttl: Ttl,
    pub(super) error_ttl: Option<Ttl>,
    /// Set with the first key or outcome that could be part of a reference cycle. Until then the garbage collector has
    /// nothing to look for here: a free-threaded build collects often, and would walk a million strings each time.
    may_refer: AtomicBool,
}

#[pymethods]
impl Coalescer {
    #[new]
    #[pyo3(signature = (ttl_seconds = Ttl::DEFAULT, error_ttl_seconds = None))]
    #[pyo3(text_signature = "(ttl_seconds=5.0, error_ttl_seconds=None)")]
    fn new(
        #[pyo3(from_py_with = options::ttl_seconds)] ttl_seconds: Ttl,
        #[pyo3(from_py_with = options::error_ttl_seconds)] error_ttl_seconds: Option<Ttl>,
    ) -> Self {
        let may_refer = AtomicBool::new(false);
        Self { map: Map::new(), ttl: ttl_seconds, error_ttl: error_ttl_seconds, may_refer }
    }

    fn __len__(&self) -> usize {
        self.map.keys()
    }

    // Without it an empty coalescer would be false, and `coalescer or default` a trap.
    #[expect(clippy::unused_self, reason = "Python calls it on an instance")]
    fn __bool__(&self) -> bool {
        true
    }

    fn __contains__(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.map.contains(key::hash(key)?, key.as_unbound())
    }

    /// Drops all retained outcomes and disowns the flights under way: their callers still get the outcome, but
    /// the next caller of the key leads a call of its own.
    fn clear(&self) {
        self.map.clear();
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        let name = slf.get_type().name()?;
        let seconds = |ttl: Ttl| pyo3::types::PyFloat::new(slf.py(), ttl.seconds).to_string();
        // What has expired is not retained, though it may wait for the sweeper.
        this.map.expire();
        let stats = this.map.stats();
        let errors = this.error_ttl.map(|ttl| format!(", error_ttl_seconds={}", seconds(ttl)));
        Ok(format!(
            "<{name} ttl_seconds={}{} in_flight={} retained={} calls={} joined={} hits={} errors={}>",
            seconds(this.ttl),
            errors.unwrap_or_default(),
            stats.in_flight,
            stats.retained,
            stats.calls,
            stats.joined,
            stats.hits,
            stats.errors,
        ))
    }

    /// Serves a task: the value of a hit, or a ticket for what there is to do.
    fn _begin<'py>(
        slf: &Bound<'py, Self>,
        key: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let hash = key::hash(key)?;
        match slf.get().find(hash, key)? {
            Found::Hit(shared) => shared.into_result(),
            found => Self::begin_missed(slf, found, hash, key, r#fn),
        }
    }

    /// How many callers wait for the flight of a key: lets tests know that all are in.
    fn _waiters(&self, key: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.map.waiters(key::hash(key)?, key.as_unbound())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let mut result = Ok(());
        if !self.may_refer.load(Ordering::Relaxed) {
            return result;
        }
        self.map.for_each(|flight| {
            if result.is_ok() {
                result = visit_flight(flight, &visit);
            }
        });
        result
    }

    fn __clear__(&self) {
        self.map.clear();
    }
}

/// Keys and retained outcomes. What a flight under way holds besides is held by the tasks and threads that wait for it.
fn visit_flight(flight: &Flight<Python3>, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
    visit.call(flight.key())?;
    match flight.retained_at_all() {
        Some(Outcome::Value(object) | Outcome::Error(object)) => visit.call(object),
        None => Ok(()),
    }
}

impl Coalescer {
    #[inline]
    fn find<'py>(&self, hash: u64, key: &Bound<'py, PyAny>) -> PyResult<Found<Python3, Shared<'py>>> {
        self.map.find(hash, key.as_unbound(), |outcome| outcome.share(key.py()))
    }

    #[cold]
    fn begin_missed<'py>(
        slf: &Bound<'py, Self>,
        mut found: Found<Python3, Shared<'py>>,
        hash: u64,
        key: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        options::callable("fn", r#fn)?;
        let event_loop = running_loop(py)?;
        let loop_id = event_loop.as_ptr().addr();
        loop {
            let ticket = match found {
                Found::Hit(shared) => return shared.into_result(),
                Found::Nothing => {
                    let lead = this.claim(hash, key, loop_id)?;
                    lead.map(|lead| Ticket::leading(lead, loop_id))
                }
                Found::Pending(flight) => {
                    if Within::includes(py, &flight)? {
                        return Err(recursive_error(key)?);
                    }
                    Ticket::joining(&this.map, &flight, &event_loop)?
                }
            };
            let Some(ticket) = ticket else {
                found = this.find(hash, key)?;
                continue;
            };
            return Ok(Bound::new(py, ticket)?.into_any());
        }
    }

    /// Claims a flight for a key that was not found; `None` if another caller was faster.
    fn claim(&self, hash: u64, key: &Bound<'_, PyAny>, led_on: LoopId) -> PyResult<Option<Lead<Python3>>> {
        self.note(key);
        self.map.claim(hash, key.clone().unbind(), led_on)
    }

    /// Shares a call's value.
    pub(super) fn complete(&self, lead: Lead<Python3>, value: Bound<'_, PyAny>) {
        self.note(&value);
        lead.complete(Outcome::Value(value.unbind()), self.ttl.nanos, false);
    }

    /// Notes an object that is about to be held, for the garbage collector. Before it is held, so that no collection
    /// can come in between.
    #[inline]
    fn note(&self, object: &Bound<'_, PyAny>) {
        // Relaxed: a collection sees all that its own thread or a stopped one has done.
        if ffi::may_refer(object) && !self.may_refer.load(Ordering::Relaxed) {
            self.may_refer.store(true, Ordering::Relaxed);
        }
    }

    /// Publishes how a call failed. The error itself is for the leader's own caller.
    pub(super) fn settle_error(
        slf: &Bound<'_, Self>,
        lead: Lead<Python3>,
        error: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let (py, this) = (slf.py(), slf.get());
        // If this raises, the lead is dropped and so handed over.
        let settled = Hooks::get(py)?.settle.bind(py).call1((slf, error))?;
        if settled.is_none() {
            return Ok(lead.abandon(true));
        }
        let (template, retain): (Py<PyAny>, bool) = settled.cast::<PyTuple>()?.extract()?;
        let ttl = if retain { this.error_ttl.unwrap_or(this.ttl).nanos } else { 0 };
        this.may_refer.store(true, Ordering::Relaxed);
        lead.complete(Outcome::Error(template), ttl, true);
        Ok(true)
    }
}

fn recursive_error(key: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    Ok(PyErr::from_value(Hooks::get(key.py())?.recursive_error.bind(key.py()).call1((key,))?))
}

/// The coalescer of threads.
#[pyclass(frozen, subclass, extends = Coalescer, module = "llm_batch_coalesce._core")]
pub(super) struct ThreadCoalescer;

#[pymethods]
impl ThreadCoalescer {
    #[new]
    #[pyo3(signature = (ttl_seconds = Ttl::DEFAULT, error_ttl_seconds = None))]
    #[pyo3(text_signature = "(ttl_seconds=5.0, error_ttl_seconds=None)")]
    fn new(
        #[pyo3(from_py_with = options::ttl_seconds)] ttl_seconds: Ttl,
        #[pyo3(from_py_with = options::error_ttl_seconds)] error_ttl_seconds: Option<Ttl>,
    ) -> PyClassInitializer<Self> {
        PyClassInitializer::from(Coalescer::new(ttl_seconds, error_ttl_seconds)).add_subclass(Self)
    }

    /// Returns the outcome of `key`: the one retained, that of the call under way, or that of calling `fn()`.
    #[pyo3(signature = (key, r#fn))]
    fn get_or_call<'py>(
        slf: &Bound<'py, Self>,
        key: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let hash = key::hash(key)?;
        match slf.as_super().get().find(hash, key)? {
            Found::Hit(shared) => shared.into_result(),
            found => missed(slf.as_super(), found, hash, key, r#fn),
        }
    }
}

#[cold]
fn missed<'py>(
    slf: &Bound<'py, Coalescer>,
    mut found: Found<Python3, Shared<'py>>,
    hash: u64,
    key: &Bound<'py, PyAny>,
    r#fn: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let (py, this) = (slf.py(), slf.get());
    options::callable("fn", r#fn)?;
    loop {
        match found {
            Found::Hit(shared) => return shared.into_result(),
            Found::Nothing => {
                if let Some(lead) = this.claim(hash, key, NO_LOOP)? {
                    return lead_call(slf, lead, r#fn);
                }
            }
            Found::Pending(flight) => {
                if Led::includes(&flight) {
                    return Err(recursive_error(key)?);
                }
                if let Some(place) = this.map.join(&flight, NO_LOOP, Wakeup::this_thread()) {
                    drop(flight);
                    match wait(py, &place)? {
                        Standing::Offered => {
                            if let Some(lead) = place.take_lead() {
                                drop(place);
                                return lead_call(slf, lead, r#fn);
                            }
                        }
                        Standing::Landed => {
                            if let Some(outcome) = place.outcome() {
                                place.count_joined();
                                let shared = outcome.share(py);
                                drop(place);
                                return shared.into_result();
                            }
                        }
                        // None of these befalls a thread; asking again is right in any case.
                        Standing::Waiting | Standing::Private | Standing::Cancelled | Standing::Withdrawn => {
                        }
                    }
                }
            }
        }
        found = this.find(hash, key)?;
    }
}

/// Runs the callable and ends the flight with what became of it.
fn lead_call<'py>(
    slf: &Bound<'py, Coalescer>,
    lead: Lead<Python3>,
    r#fn: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = slf.py();
    let result = {
        let _led = Led::push(&lead);
        ffi::call0(r#fn)
    };
    let result = match result {
        Ok(value) if ffi::is_coroutine(&value) => Err(refused(r#fn, &value)?),
        result => result,
    };
    match result {
        Ok(value) => {
            slf.get().complete(lead, value.clone());
            Ok(value)
        }
        Err(error) => {
            let exception = error.into_value(py).into_bound(py).into_any();
            Coalescer::settle_error(slf, lead, &exception)?;
            Err(PyErr::from_value(exception))
        }
    }
}

/// The error of a callable that returned a coroutine, which threads cannot share.
fn refused(r#fn: &Bound<'_, PyAny>, coroutine: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    Ok(PyErr::from_value(Hooks::get(r#fn.py())?.refuse.bind(r#fn.py()).call1((r#fn, coroutine))?))
}

/// Waits until the flight has something for this thread.
fn wait(py: Python<'_>, place: &Place<Python3>) -> PyResult<Standing> {
    /// How often the main thread looks for signals.
    const SIGNALS: std::time::Duration = std::time::Duration::from_millis(50);
    let limit = is_main_thread(py)?.then_some(SIGNALS);
    loop {
        let standing = ffi::detached(py, || place.wait(limit));
        if standing != Standing::Waiting {
            place.pass_baton();
            return Ok(standing);
        }
        py.check_signals()?;
    }
}

/// Signals are handled in the main thread only.
fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    use pyo3::intern;
    let threading = py.import(intern!(py, "threading"))?;
    let main = threading.call_method0(intern!(py, "main_thread"))?.getattr(intern!(py, "ident"))?;
    main.eq(threading.call_method0(intern!(py, "get_ident"))?)
}

thread_local! {
    /// The flights that this thread leads at the moment, outermost first.
    static LED: RefCell<Vec<(*const Flight<Python3>, u32)>> = const { RefCell::new(Vec::new()) };
}

/// Notes that this thread leads a flight, as long as it lives.
struct Led;

impl Led {
    fn push(lead: &Lead<Python3>) -> Self {
        LED.with_borrow_mut(|led| led.push((Arc::as_ptr(lead.flight()), lead.epoch())));
        Self
    }

    /// Whether this thread would wait for itself.
    fn includes(flight: &Arc<Flight<Python3>>) -> bool {
        let wanted = Arc::as_ptr(flight);
        LED.with_borrow(|led| led.iter().any(|&(own, epoch)| own == wanted && flight.epoch() == Some(epoch)))
    }
}

impl Drop for Led {
    fn drop(&mut self) {
        LED.with_borrow_mut(Vec::pop);
    }
}
