//! The base classes of the public coalescers.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use super::answer::{Answer, Request, find, find_value};
use super::family::{Outcome, Python3, Shared, check_interrupt, running_loop};
use super::hooks::Hooks;
use super::inside::Inside;
use super::options::{self, ErrorTtl, Patience, Ttl};
use super::retain::Retain;
use super::task::Ticket;
use super::{ffi, key};
use crate::circle::Nested;
use crate::clock::FOREVER;
use crate::flight::Flight;
use crate::lead::Lead;
use crate::map::{Found, Map, Settings};
use crate::sync::Arc;
use crate::waiter::{LoopId, Origin};

/// What both kinds of coalescer have: the map, the options, and the questions about them.
#[pyclass(frozen, subclass, weakref, module = "llm_batch_coalesce._core")]
#[derive(Default)]
pub(super) struct Coalescer {
    /// Made by `__init__`, so that subclasses may have constructors of their own.
    made: OnceLock<Made>,
}

struct Made {
    map: Arc<Map<Python3>>,
    options: Options,
    /// The coalescer whose map this is, if it is another one's.
    origin: Option<Py<Coalescer>>,
    /// Set with the first key or outcome that could be part of a reference cycle. Until then the garbage collector has
    /// nothing to look for among them: a free-threaded build collects often, and would walk a million strings each time.
    may_refer: Arc<AtomicBool>,
}

pub(super) struct Options {
    pub(super) ttl: Ttl,
    pub(super) error_ttl: ErrorTtl,
    pub(super) private_errors: Option<Py<PyTuple>>,
    pub(super) max_flight: Option<Ttl>,
    pub(super) max_retained: Option<u64>,
    /// Whether a call that this coalescer leads on an event loop goes on when all its callers have left.
    pub(super) finishes: bool,
    pub(super) name: Option<Arc<str>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ttl: Ttl::DEFAULT,
            error_ttl: ErrorTtl::Same,
            private_errors: None,
            max_flight: None,
            max_retained: None,
            finishes: false,
            name: None,
        }
    }
}

impl Options {
    fn settings(&self) -> Settings {
        Settings {
            name: self.name.clone(),
            max_flight: self.max_flight.map_or(FOREVER, |limit| limit.nanos),
            max_retained: self.max_retained,
        }
    }
}

impl Made {
    fn new(options: Options) -> Self {
        let map = Map::new(options.settings());
        Self { map, options, origin: None, may_refer: Arc::new(AtomicBool::new(false)) }
    }
}

#[pymethods]
impl Coalescer {
    #[new]
    #[pyo3(signature = (*_arguments, **_options))]
    #[pyo3(text_signature = "(ttl_seconds=5.0, *, error_ttl_seconds=None, private_errors=(), \
        max_flight_seconds=None, max_retained=None, on_abandoned='cancel', name=None)")]
    pub(super) fn new(_arguments: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, PyDict>>) -> Self {
        Self::default()
    }

    #[pyo3(signature = (ttl_seconds = Ttl::DEFAULT, *, error_ttl_seconds = ErrorTtl::Same, private_errors = None,
        max_flight_seconds = None, max_retained = None, on_abandoned = false, name = None))]
    #[expect(clippy::too_many_arguments, reason = "they are options, given by name")]
    fn __init__(
        &self,
        #[pyo3(from_py_with = options::ttl_seconds)] ttl_seconds: Ttl,
        #[pyo3(from_py_with = options::error_ttl_seconds)] error_ttl_seconds: ErrorTtl,
        #[pyo3(from_py_with = options::private_errors)] private_errors: Option<Py<PyTuple>>,
        #[pyo3(from_py_with = options::max_flight_seconds)] max_flight_seconds: Option<Ttl>,
        #[pyo3(from_py_with = options::max_retained)] max_retained: Option<u64>,
        #[pyo3(from_py_with = options::on_abandoned)] on_abandoned: bool,
        #[pyo3(from_py_with = options::name)] name: Option<Arc<str>>,
    ) -> PyResult<()> {
        self.make(Options {
            ttl: ttl_seconds,
            error_ttl: error_ttl_seconds,
            private_errors,
            max_flight: max_flight_seconds,
            max_retained,
            finishes: on_abandoned,
            name,
        })
    }

    /// Instead of `__init__`: becomes another face of a coalescer, on the same map.
    fn _face_of(
        &self,
        other: &Bound<'_, Self>,
        #[pyo3(from_py_with = options::on_abandoned)] on_abandoned: bool,
    ) -> PyResult<()> {
        let (py, there) = (other.py(), other.get().made());
        let options = Options {
            error_ttl: there.options.error_ttl.clone_ref(py),
            private_errors: there.options.private_errors.as_ref().map(|classes| classes.clone_ref(py)),
            name: there.options.name.clone(),
            finishes: on_abandoned,
            ..there.options
        };
        let origin =
            there.origin.as_ref().map_or_else(|| other.clone().unbind(), |origin| origin.clone_ref(py));
        self.set(Made {
            map: Arc::clone(&there.map),
            options,
            origin: Some(origin),
            may_refer: Arc::clone(&there.may_refer),
        })
    }

    /// The name given to the constructor.
    #[getter]
    fn name(&self) -> Option<&str> {
        self.made().options.name.as_deref()
    }

    fn __len__(&self) -> usize {
        self.map().keys()
    }

    // Without it an empty coalescer would be false, and `coalescer or default` a trap.
    #[expect(clippy::unused_self, reason = "Python calls it on an instance")]
    fn __bool__(&self) -> bool {
        true
    }

    fn __contains__(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.map().contains(key::hash(key)?, key.as_unbound())
    }

    #[pyo3(signature = (key, default = None))]
    fn peek<'py>(
        &self,
        key: &Bound<'py, PyAny>,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, hash) = (key.py(), key::hash(key)?);
        match self.map().peek(hash, key.as_unbound(), |outcome| outcome.share(py))? {
            Some(Shared::Value(value)) => Ok(value),
            Some(Shared::Error(_)) | None => Ok(default.unwrap_or_else(|| py.None().into_bound(py))),
        }
    }

    #[pyo3(signature = (key, value, ttl_seconds = None))]
    fn put(
        &self,
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = options::own_ttl_seconds)] ttl_seconds: Option<Ttl>,
    ) -> PyResult<()> {
        let hash = key::hash(key)?;
        Retain::refuse(value)?;
        let ttl = ttl_seconds.unwrap_or(self.made().options.ttl);
        if ttl.nanos == 0 {
            self.map().forget(hash, key.as_unbound())?;
        } else {
            self.note(key);
            self.note(value);
            let outcome = Outcome::Value(value.clone().unbind());
            self.map().put(hash, key.clone().unbind(), outcome, ttl.nanos)?;
        }
        Ok(())
    }

    fn forget(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.map().forget(key::hash(key)?, key.as_unbound())
    }

    fn cancel(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        let was_in_flight = self.map().cancel(key::hash(key)?, key.as_unbound())?;
        check_interrupt()?;
        Ok(was_in_flight)
    }

    /// Drops all retained outcomes and disowns the flights under way: their callers still get the outcome, but
    /// the next caller of the key leads a call of its own.
    fn clear(&self) {
        self.map().clear();
    }

    fn reset_stats(&self) {
        self.map().reset_stats();
    }

    /// The counters, in the order of `Stats`.
    fn _stats(&self) -> (u64, u64, u64, u64, u64, u64, u64, u64, u64, u64) {
        // What has expired is not retained, though it may wait for the sweeper.
        self.map().expire();
        let stats = self.map().stats();
        (
            stats.calls,
            stats.joined,
            stats.hits,
            stats.errors,
            stats.timeouts,
            stats.cancelled,
            stats.handed_over,
            stats.evicted,
            stats.in_flight,
            stats.retained,
        )
    }

    /// Of each flight: key, age in seconds, number of waiters, and who leads: number of the thread, and weakly the
    /// caller's task and the call's. None of these while the lead is being handed over.
    fn _flights<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let views = self.map().flights();
        let flights = views.iter().map(|view| {
            let call = view.call.as_ref();
            let (caller, task) = (call.map(|call| call.caller.bind(py)), call.map(|call| call.task.bind(py)));
            let thread = (!view.offered).then_some(view.led_by.thread);
            let age = std::time::Duration::from_nanos(view.age).as_secs_f64();
            (view.flight.key(), age, view.waiters, thread, caller, task).into_pyobject(py)
        });
        flights.collect()
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        let class = slf.get_type().name()?;
        let seconds = |ttl: Ttl| pyo3::types::PyFloat::new(slf.py(), ttl.seconds).to_string();
        // What has expired is not retained, though it may wait for the sweeper.
        this.map().expire();
        let stats = this.map().stats();
        let name = match this.made().options.name.as_deref() {
            Some(name) => format!(" {}", PyString::new(slf.py(), name).repr()?),
            None => String::new(),
        };
        let errors = match &this.made().options.error_ttl {
            ErrorTtl::Same => String::new(),
            ErrorTtl::Fixed(ttl) => format!(" error_ttl_seconds={}", seconds(*ttl)),
            ErrorTtl::Decided(_) => " error_ttl_seconds=callable".to_owned(),
        };
        Ok(format!(
            "<{class}{name} ttl_seconds={}{errors} in_flight={} retained={} calls={} joined={} hits={} errors={}>",
            seconds(this.made().options.ttl),
            stats.in_flight,
            stats.retained,
            stats.calls,
            stats.joined,
            stats.hits,
            stats.errors,
        ))
    }

    /// The value of a hit, or `missing`.
    #[pyo3(signature = (key, missing, /))]
    fn _hit<'py>(&self, key: &Bound<'py, PyAny>, missing: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        match find_value(self.map(), key::hash(key)?, key)? {
            Found::Hit(Shared::Value(value)) if value.is(missing) => {
                // Its caller takes it for none, and asks again.
                self.map().uncount_hit();
                Ok(value)
            }
            Found::Hit(shared) => shared.into_result(),
            Found::Pending(_) | Found::Nothing => Ok(missing.clone()),
        }
    }

    /// Serves a task: the value of a hit, or a ticket for what there is to do. `detailed` is for an `Outcome`.
    #[pyo3(signature = (key, r#fn, timeout, ttl_seconds, /, *, detailed = false))]
    fn _begin<'py>(
        slf: &Bound<'py, Self>,
        key: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
        timeout: Option<&Bound<'py, PyAny>>,
        ttl_seconds: Option<&Bound<'py, PyAny>>,
        detailed: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let request = Request::new(timeout, ttl_seconds, detailed)?;
        let hash = key::hash(key)?;
        let map = slf.get().map();
        Self::begin(slf, map, find(map, hash, key)?, hash, key, r#fn, request)
    }

    /// How many callers wait for the flight of a key: lets tests know that all are in.
    fn _waiters(&self, key: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.map().waiters(key::hash(key)?, key.as_unbound())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(made) = self.made.get() else { return Ok(()) };
        visit.call(&made.options.private_errors)?;
        if let ErrorTtl::Decided(decide) = &made.options.error_ttl {
            visit.call(decide)?;
        }
        if made.origin.is_some() {
            // What the map holds is the origin's.
            return visit.call(&made.origin);
        }
        let mut result = Ok(());
        let map = made.map.newest();
        map.for_each_task(|task| {
            if result.is_ok() {
                result = visit.call(&task.event_loop).and_then(|()| visit.call(&task.future));
            }
        });
        if made.may_refer.load(Ordering::Relaxed) {
            map.for_each(|flight| {
                if result.is_ok() {
                    result = visit_flight(flight, &visit);
                }
            });
        }
        result
    }

    fn __clear__(&self) {
        if let Some(made) = self.made.get().filter(|made| made.origin.is_none()) {
            made.map.newest().clear();
        }
    }
}

/// Keys and retained outcomes.
fn visit_flight(flight: &Flight<Python3>, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
    visit.call(flight.key())?;
    match flight.retained_at_all() {
        Some(Outcome::Value(object) | Outcome::Error(object)) => visit.call(object),
        None => Ok(()),
    }
}

impl Coalescer {
    pub(super) fn make(&self, options: Options) -> PyResult<()> {
        self.set(Made::new(options))
    }

    fn set(&self, made: Made) -> PyResult<()> {
        let twice = || PyRuntimeError::new_err("a coalescer's __init__ is called once, before its first use");
        self.made.set(made).map_err(|_| twice())
    }

    /// A subclass that leaves out `__init__` has the default options.
    #[inline]
    fn made(&self) -> &Made {
        self.made.get_or_init(|| Made::new(Options::default()))
    }

    #[inline]
    pub(super) fn map(&self) -> &Arc<Map<Python3>> {
        self.made().map.current()
    }

    pub(super) fn finishes(&self) -> bool {
        self.made().options.finishes
    }

    #[cold]
    fn begin<'a, 'py>(
        slf: &'a Bound<'py, Self>,
        mut map: &'a Arc<Map<Python3>>,
        mut found: Found<Python3, Answer<'py>>,
        hash: u64,
        key: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
        request: Request,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        if !matches!(found, Found::Hit(_)) {
            options::callable("fn", r#fn)?;
        }
        let event_loop = running_loop(py)?;
        let loop_id = event_loop.as_ptr().addr();
        loop {
            let ticket = match found {
                Found::Hit(answer) => return answer.into_result(py, request.detailed),
                Found::Nothing => {
                    let lead = this.claim(map, hash, key, loop_id)?;
                    lead.map(|lead| Ticket::leading(lead, loop_id, this.finishes(), request))
                }
                Found::Pending(flight) => {
                    let inside = Inside::of_task(py)?;
                    if inside.includes(&flight) {
                        return Err(this.recursive_error(key)?);
                    }
                    if request.patience == Patience::None {
                        map.count_timeout(hash);
                        return Err(timeout_error(map, key, 0_u8.into_pyobject(py)?.as_any())?);
                    }
                    let nested = this.begin_nested(&inside, &[], &flight, key, request)?;
                    Ticket::joining(this, map, &flight, &event_loop, nested, request)?
                }
            };
            if let Some(ticket) = ticket {
                return Ok(Bound::new(py, ticket)?.into_any());
            }
            map = this.map();
            found = find(map, hash, key)?;
        }
    }

    /// Claims a flight for a key that was not found; `None` if another caller was faster.
    pub(super) fn claim(
        &self,
        map: &Arc<Map<Python3>>,
        hash: u64,
        key: &Bound<'_, PyAny>,
        loop_id: LoopId,
    ) -> PyResult<Option<Lead<Python3>>> {
        self.note(key);
        let origin = Origin { loop_id, thread: ffi::thread_number() };
        map.claim(hash, key.clone().unbind(), origin)
    }

    /// Notes a wait of a caller that others wait for. Fails if it would close a circle.
    pub(super) fn begin_nested(
        &self,
        inside: &Inside,
        blocked: &[LoopId],
        flight: &Arc<Flight<Python3>>,
        key: &Bound<'_, PyAny>,
        request: Request,
    ) -> PyResult<Option<Nested>> {
        let mut sources = inside.sources();
        sources.extend(blocked.iter().copied().map(crate::circle::Source::Loop));
        // A wait that ends by itself is no part of a circle.
        if sources.is_empty() || request.patience != Patience::Endless {
            return Ok(None);
        }
        match Nested::begin(sources, flight) {
            Ok(nested) => Ok(Some(nested)),
            Err(crate::circle::Circle) => Err(self.deadlock_error(key)?),
        }
    }

    /// Shares a call's value, and returns what the callers get.
    pub(super) fn complete<'py>(
        &self,
        lead: Lead<Python3>,
        value: Bound<'py, PyAny>,
        ttl: Option<Ttl>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (value, ttl) = Retain::open(value, ttl.unwrap_or(self.made().options.ttl));
        self.note(&value);
        lead.complete(Outcome::Value(value.clone().unbind()), ttl.nanos, false);
        check_interrupt()?;
        Ok(value)
    }

    /// Notes an object that is about to be held, for the garbage collector. Before it is held, so that no collection
    /// can come in between.
    #[inline]
    fn note(&self, object: &Bound<'_, PyAny>) {
        // Relaxed: a collection sees all that its own thread or a stopped one has done.
        let may_refer = &self.made().may_refer;
        if ffi::may_refer(object) && !may_refer.load(Ordering::Relaxed) {
            may_refer.store(true, Ordering::Relaxed);
        }
    }

    /// Publishes how a call failed. The error itself is for the leader's own caller; false if that is gone and nobody
    /// else has it.
    pub(super) fn settle_error(
        &self,
        lead: Lead<Python3>,
        error: &Bound<'_, PyAny>,
        ttl: Option<Ttl>,
    ) -> PyResult<bool> {
        let py = error.py();
        let (none, nothing) = (py.None().into_bound(py), PyTuple::empty(py));
        let private =
            self.made().options.private_errors.as_ref().map_or(&nothing, |classes| classes.bind(py));
        let decide = match &self.made().options.error_ttl {
            ErrorTtl::Decided(decide) => decide.bind(py),
            ErrorTtl::Same | ErrorTtl::Fixed(_) => &none,
        };
        // If this raises, the lead is dropped and so handed over.
        let name = self.made().options.name.as_deref().into_pyobject(py)?;
        let settled = ffi::call(Hooks::get(py)?.settle.bind(py), [error, private, decide, &name])?;
        let delivered = if settled.is_none() {
            lead.abandon(true)
        } else {
            let (template, seconds): (Py<PyAny>, Option<Bound<'_, PyAny>>) = settled.extract()?;
            let ttl = match (seconds, &self.made().options.error_ttl) {
                (Some(seconds), _) => options::ttl("error_ttl_seconds", &seconds)?,
                (None, ErrorTtl::Fixed(ttl)) => *ttl,
                (None, ErrorTtl::Same | ErrorTtl::Decided(_)) => ttl.unwrap_or(self.made().options.ttl),
            };
            self.made().may_refer.store(true, Ordering::Relaxed);
            lead.complete(Outcome::Error(template), ttl.nanos, true);
            true
        };
        check_interrupt()?;
        Ok(delivered)
    }

    pub(super) fn recursive_error(&self, key: &Bound<'_, PyAny>) -> PyResult<PyErr> {
        let py = key.py();
        let name = self.made().options.name.as_deref().into_pyobject(py)?;
        Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.recursive_error.bind(py), [key, &name])?))
    }

    pub(super) fn deadlock_error(&self, key: &Bound<'_, PyAny>) -> PyResult<PyErr> {
        let py = key.py();
        let name = self.made().options.name.as_deref().into_pyobject(py)?;
        Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.deadlock_error.bind(py), [key, &name])?))
    }
}

pub(super) fn timeout_error(
    map: &Map<Python3>,
    key: &Bound<'_, PyAny>,
    timeout: &Bound<'_, PyAny>,
) -> PyResult<PyErr> {
    let py = key.py();
    let name = map.settings().name.as_deref().into_pyobject(py)?;
    Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.timeout_error.bind(py), [key, &name, timeout])?))
}

/// The error of a waiter whose key was cancelled.
pub(super) fn cancelled_error(map: &Map<Python3>, key: &Bound<'_, PyAny>, in_task: bool) -> PyResult<PyErr> {
    let py = key.py();
    let name = map.settings().name.as_deref().into_pyobject(py)?;
    let in_task = in_task.into_pyobject(py)?;
    Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.cancelled_error.bind(py), [key, &name, &in_task])?))
}
