//! The base classes of the public coalescers.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};

use super::answer::{Answer, Request, find, find_value};
use super::errors::timeout_error;
use super::family::{Outcome, Python3, Shared, check_interrupt, running_loop};
use super::hooks::Hooks;
use super::inside::Inside;
use super::many::{self, Admitted};
use super::options::{self, ErrorTtl, Patience, Ttl};
use super::reader::StreamReader;
use super::retain::Retain;
use super::streams::{Asked, Streams};
use super::task::Ticket;
use super::thread::ThreadCoalescer;
use super::{ffi, held, key, overview};
use crate::circle::{Nested, Target};
use crate::clock::FOREVER;
use crate::flight::Flight;
use crate::lead::Lead;
use crate::map::{Found, Map, Settings};
use crate::stats::Stats;
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
    /// The map of streams, made with the first of them.
    streams: Arc<OnceLock<Arc<Map<Streams>>>>,
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
    /// Adapted by the Python layer.
    pub(super) store: Option<Py<PyAny>>,
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
            store: None,
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
        let (streams, may_refer) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        Self { map, streams, options, origin: None, may_refer }
    }
}

#[pymethods]
impl Coalescer {
    #[new]
    #[pyo3(signature = (*_arguments, **_options))]
    #[pyo3(text_signature = "(ttl_seconds=5.0, *, error_ttl_seconds=None, private_errors=(), \
        max_flight_seconds=None, max_retained=None, on_abandoned='cancel', name=None, store=None)")]
    pub(super) fn new(_arguments: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, PyDict>>) -> Self {
        Self::default()
    }

    #[pyo3(signature = (ttl_seconds = Ttl::DEFAULT, *, error_ttl_seconds = ErrorTtl::Same, private_errors = None,
        max_flight_seconds = None, max_retained = None, on_abandoned = false, name = None, store = None))]
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
        store: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.make(Options {
            ttl: ttl_seconds,
            error_ttl: error_ttl_seconds,
            private_errors,
            max_flight: max_flight_seconds,
            max_retained,
            finishes: on_abandoned,
            name,
            store: options::store(store, true)?,
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
            store: there.options.store.as_ref().map(|store| store.clone_ref(py)),
            finishes: on_abandoned,
            ..there.options
        };
        let origin =
            there.origin.as_ref().map_or_else(|| other.clone().unbind(), |origin| origin.clone_ref(py));
        self.set(Made {
            map: Arc::clone(&there.map),
            streams: Arc::clone(&there.streams),
            options,
            origin: Some(origin),
            may_refer: Arc::clone(&there.may_refer),
        })
    }

    /// The name given to the constructor.
    #[getter(name)]
    fn given_name(&self) -> Option<&str> {
        self.name()
    }

    fn __len__(&self) -> usize {
        self.map().keys() + self.streams_begun().map_or(0, |streams| streams.keys())
    }

    // Without it an empty coalescer would be false, and `coalescer or default` a trap.
    #[expect(clippy::unused_self, reason = "Python calls it on an instance")]
    fn __bool__(&self) -> bool {
        true
    }

    fn __contains__(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (hash, key) = (key::hash(key)?, key.as_unbound());
        Ok(self.map().contains(hash, key)?
            || self.streams_begun().map_or(Ok(false), |streams| streams.contains(hash, key))?)
    }

    /// Return the retained value of a key, or the default. Never calls, never waits, and is no request.
    ///
    /// Args:
    ///     key: Any hashable object.
    ///     default: What to return if no value is retained: the key is unknown, in flight, or an error is retained.
    ///
    /// Raises:
    ///     TypeError: If the key is unhashable.
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

    /// Retain a value as if a call had just returned it.
    ///
    /// A flight of the key under way is forgotten: its waiters keep waiting for it, and its outcome is not retained.
    ///
    /// Args:
    ///     key: Any hashable object.
    ///     value: What later callers get.
    ///     ttl_seconds: How long it is retained, in seconds; None takes the coalescer's TTL, 0 only forgets the key.
    ///
    /// Raises:
    ///     TypeError: If the key is unhashable, the TTL is no number, or the value is a `Retain`.
    ///     ValueError: If the TTL is negative or NaN.
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
            let outcome = Outcome::Value(value.clone().unbind().into());
            self.map().put(hash, key.clone().unbind(), outcome, ttl.nanos)?;
        }
        Ok(())
    }

    /// Drop a key, so that its next caller leads a call of its own.
    ///
    /// A retained outcome is dropped. Those who wait for a flight under way keep waiting, and its outcome is not
    /// retained.
    ///
    /// Args:
    ///     key: Any hashable object.
    ///
    /// Returns:
    ///     Whether the key was retained or in flight.
    ///
    /// Raises:
    ///     TypeError: If the key is unhashable.
    fn forget(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (hash, key) = (key::hash(key)?, key.as_unbound());
        let there = self.map().forget(hash, key)?;
        Ok(self.streams_begun().map_or(Ok(false), |streams| streams.forget(hash, key))? || there)
    }

    /// Wake all who wait for a key's call with a CancelledError, and drop the key.
    ///
    /// Threads get `concurrent.futures.CancelledError`, tasks `asyncio.CancelledError`. The caller that runs the call
    /// still gets its result; a call of a task whose caller has gone is cancelled.
    ///
    /// Args:
    ///     key: Any hashable object.
    ///
    /// Returns:
    ///     Whether the key was in flight. A retained outcome stays.
    ///
    /// Raises:
    ///     TypeError: If the key is unhashable.
    fn cancel(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        let was_in_flight = self.map().cancel(key::hash(key)?, key.as_unbound())?;
        check_interrupt()?;
        Ok(was_in_flight)
    }

    /// Drop all retained outcomes and disown the flights under way.
    ///
    /// Their callers still get the outcome, but the next caller of the key leads a call of its own.
    fn clear(&self) {
        self.map().clear();
        if let Some(streams) = self.streams_begun() {
            streams.clear();
        }
    }

    /// Count from zero. `in_flight` and `retained` are no counts and stay as they are.
    fn reset_stats(&self) {
        self.map().reset_stats();
        if let Some(streams) = self.streams_begun() {
            streams.reset_stats();
        }
    }

    /// The counters, in the order of `Stats`.
    fn _stats(&self) -> [u64; 12] {
        let stats = self.counted();
        [
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
            stats.store_hits,
            stats.store_errors,
        ]
    }

    /// The store as the Python layer has adapted it.
    #[getter(_store)]
    fn given_store<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.store(py).cloned()
    }

    /// Counts and logs a store that has failed.
    #[pyo3(name = "_store_failed")]
    pub(super) fn store_failed(
        &self,
        key: &Bound<'_, PyAny>,
        verb: &str,
        error: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let py = key.py();
        self.map().count_store_error(key::hash(key)?);
        let (verb, name) = (PyString::new(py, verb).into_any(), self.name().into_pyobject(py)?);
        ffi::call(Hooks::get(py)?.report_store_error.bind(py), [error, &verb, key, &name]).map(drop)
    }

    /// Of each flight: key, age in seconds, number of waiters, who leads: number of the thread, and weakly the
    /// caller's task and the call's (none of these while the lead is being handed over), and whether it is a stream.
    fn _flights<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        overview::flights(py, self.map(), self.streams_begun())
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        let class = slf.get_type().name()?;
        let seconds = |ttl: Ttl| pyo3::types::PyFloat::new(slf.py(), ttl.seconds).to_string();
        let stats = this.counted();
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

    /// Serves a task that wants many keys: of each the value, the error that it shares, or a ticket. One that joins has to
    /// `begin_waiting` when its task has done what it leads.
    #[pyo3(signature = (keys, r#fn, timeout, ttl_seconds, /))]
    fn _admit<'py>(
        slf: &Bound<'py, Self>,
        keys: &Bound<'py, PyList>,
        r#fn: &Bound<'py, PyAny>,
        timeout: Option<&Bound<'py, PyAny>>,
        ttl_seconds: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Admission<'py>>> {
        let (py, this) = (slf.py(), slf.get());
        let request = Request::new(timeout, ttl_seconds, false)?;
        options::callable("fn", r#fn)?;
        let event_loop = running_loop(py)?;
        let loop_id = event_loop.as_ptr().addr();
        let join = |map: &Arc<Map<Python3>>, flight: &Arc<Flight<Python3>>| {
            Ticket::joining(this, map, flight, &event_loop, None, request, true)
        };
        let keys: Vec<_> = keys.iter().collect();
        let admitted = many::admit(this, &keys, loop_id, Inside::of_task, request, join, Ticket::refuse)?;
        let ticket = |ticket| Ok((Some(Bound::new(py, ticket)?), None, None));
        admitted
            .into_iter()
            .map(|admitted| match admitted {
                Admitted::Known(Ok(value)) => Ok((None, Some(value), None)),
                Admitted::Known(Err(error)) => Ok((None, None, Some(error.into_value(py)))),
                Admitted::Leads(lead) => ticket(Ticket::leading(lead, loop_id, this.finishes(), request)),
                Admitted::Joined(joined) => ticket(joined),
            })
            .collect()
    }

    /// How many callers wait for the flight of a key: lets tests know that all are in.
    fn _waiters(&self, key: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.map().waiters(key::hash(key)?, key.as_unbound())
    }

    /// How many readers a key's stream under way has, and how many of them wait; for tests, too.
    fn _readers(&self, key: &Bound<'_, PyAny>) -> PyResult<(usize, usize)> {
        let Some(streams) = self.streams_begun() else { return Ok((0, 0)) };
        let found = streams.get(key::hash(key)?, key.as_unbound())?;
        let stream = found.and_then(|flight| flight.call());
        Ok(stream.map_or((0, 0), |stream| (stream.log.readers(), stream.log.waiting())))
    }

    /// Checks a TTL of one's own.
    #[pyo3(signature = (ttl_seconds, /))]
    #[expect(clippy::unused_self, reason = "Python calls it on an instance")]
    fn _check_ttl(&self, ttl_seconds: &Bound<'_, PyAny>) -> PyResult<()> {
        options::own_ttl_seconds(ttl_seconds).map(drop)
    }

    /// Checks the arguments of a stream that is to be opened later.
    #[pyo3(signature = (key, r#fn, ttl_seconds, max_buffered, /))]
    #[expect(clippy::unused_self, reason = "Python calls it on an instance")]
    fn _check_stream(
        &self,
        key: &Bound<'_, PyAny>,
        r#fn: &Bound<'_, PyAny>,
        ttl_seconds: &Bound<'_, PyAny>,
        max_buffered: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        key::hash(key)?;
        options::callable("fn", r#fn)?;
        options::own_ttl_seconds(ttl_seconds)?;
        options::max_buffered(max_buffered).map(drop)
    }

    /// Joins the stream of a key, or begins one.
    #[pyo3(signature = (key, ttl_seconds, max_buffered, pumped, /))]
    fn _open(
        slf: &Bound<'_, Self>,
        key: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = options::own_ttl_seconds)] ttl_seconds: Option<Ttl>,
        #[pyo3(from_py_with = options::max_buffered)] max_buffered: usize,
        pumped: bool,
    ) -> PyResult<StreamReader> {
        // Threads have threads pump, whatever loop runs where they ask.
        let pumped_here = pumped && !slf.is_instance_of::<ThreadCoalescer>();
        StreamReader::open(slf, key, Asked { ttl: ttl_seconds, max_buffered, pumped_here })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(made) = self.made.get() else { return Ok(()) };
        visit.call(&made.options.private_errors)?;
        visit.call(&made.options.store)?;
        if let ErrorTtl::Decided(decide) = &made.options.error_ttl {
            visit.call(decide)?;
        }
        if made.origin.is_some() {
            // What the map holds is the origin's.
            return visit.call(&made.origin);
        }
        let streams = made.streams.get().map(Map::newest);
        held::show(made.map.newest(), streams, made.may_refer.load(Ordering::Relaxed), &visit)
    }

    fn __clear__(&self) {
        if let Some(made) = self.made.get().filter(|made| made.origin.is_none()) {
            made.map.newest().clear();
            if let Some(streams) = made.streams.get() {
                streams.newest().clear();
            }
        }
    }
}

/// Of a key: the ticket of a task, the value, or the error.
type Admission<'py> =
    (Option<Bound<'py, Ticket>>, Option<Bound<'py, PyAny>>, Option<Py<pyo3::exceptions::PyBaseException>>);

impl Coalescer {
    pub(super) fn make(&self, options: Options) -> PyResult<()> {
        self.set(Made::new(options))
    }

    fn set(&self, made: Made) -> PyResult<()> {
        let twice = || PyRuntimeError::new_err("a coalescer's __init__ is called once, before its first use");
        self.made.set(made).map_err(|_| twice())
    }

    pub(super) fn options(&self) -> &Options {
        &self.made().options
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

    /// The map of streams.
    pub(super) fn streams(&self) -> &Arc<Map<Streams>> {
        let made = self.made();
        made.streams.get_or_init(|| Map::new(made.options.settings())).current()
    }

    /// The same, if there has been a stream.
    fn streams_begun(&self) -> Option<&Arc<Map<Streams>>> {
        self.made().streams.get().map(Map::current)
    }

    /// The counters of calls and streams.
    fn counted(&self) -> Stats {
        // What has expired is not retained, though it may wait for the sweeper.
        self.map().expire();
        let calls = self.map().stats();
        self.streams_begun().map_or(calls, |streams| {
            streams.expire();
            calls.plus(&streams.stats())
        })
    }

    pub(super) fn store<'a, 'py>(&'a self, py: Python<'py>) -> Option<&'a Bound<'py, PyAny>> {
        self.made().options.store.as_ref().map(|store| store.bind(py))
    }

    pub(super) fn ttl(&self) -> Ttl {
        self.made().options.ttl
    }

    pub(super) fn name(&self) -> Option<&str> {
        self.made().options.name.as_deref()
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
                    let endless = request.patience == Patience::Endless;
                    let target = Arc::clone(&flight) as Arc<dyn Target>;
                    let nested = this.begin_nested(&inside, &[], &target, key, endless)?;
                    Ticket::joining(this, map, &flight, &event_loop, nested, request, false)?
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
        target: &Arc<dyn Target>,
        key: &Bound<'_, PyAny>,
        endless: bool,
    ) -> PyResult<Option<Nested>> {
        let mut sources = inside.sources();
        sources.extend(blocked.iter().copied().map(crate::circle::Source::Loop));
        // A wait that ends by itself is no part of a circle.
        if sources.is_empty() || !endless {
            return Ok(None);
        }
        match Nested::begin_for(sources, target) {
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
        if let Some(seconds) = Retain::took(&value) {
            lead.flight().took(seconds);
        }
        let (value, ttl) = Retain::open(value, ttl.unwrap_or(self.made().options.ttl));
        self.note(&value);
        lead.complete(Outcome::Value(value.clone().unbind().into()), ttl.nanos, false);
        check_interrupt()?;
        Ok(value)
    }

    /// Notes that an error is about to be held, for the garbage collector.
    pub(super) fn note_error(&self) {
        self.made().may_refer.store(true, Ordering::Relaxed);
    }

    /// Notes an object that is about to be held, for the garbage collector. Before it is held, so that no collection
    /// can come in between.
    #[inline]
    pub(super) fn note(&self, object: &Bound<'_, PyAny>) {
        // Relaxed: a collection sees all that its own thread or a stopped one has done.
        let may_refer = &self.made().may_refer;
        if ffi::may_refer(object) && !may_refer.load(Ordering::Relaxed) {
            may_refer.store(true, Ordering::Relaxed);
        }
    }
}
