//! A family without Python, the shortest ways through the map, and a limit for whatever may block.

use std::convert::Infallible;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::Duration;

use llm_batch_coalesce::clock::{self, Nanos};
use llm_batch_coalesce::expiry;
use llm_batch_coalesce::family::Family;
use llm_batch_coalesce::flight::Flight;
use llm_batch_coalesce::lead::{Lead, Place};
use llm_batch_coalesce::map::{Found, Map};
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::waiter::{LoopId, NO_LOOP, Origin, Waiter, Wakeup};

use crate::ops;

pub(crate) const SECOND: Nanos = 1_000_000_000;

/// Whether a test hangs, perhaps with the clock in its hands.
static HANGS: AtomicBool = AtomicBool::new(false);

/// Runs what may block; if it does for half a minute, the test has failed.
pub(crate) fn in_time<R: Send + 'static>(body: impl FnOnce() -> R + Send + 'static) -> R {
    let (done, finished) = mpsc::channel::<()>();
    let thread = thread::spawn(move || {
        // Dropped when the body returns or panics.
        let _done = done;
        body()
    });
    if finished.recv_timeout(Duration::from_secs(30)) == Err(RecvTimeoutError::Timeout) {
        HANGS.store(true, SeqCst);
        panic!("it hangs");
    }
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Looks until something has become so. The sweeper may be about to do it at this very moment.
pub(crate) fn eventually(mut look: impl FnMut() -> bool) {
    while !look() {
        thread::yield_now();
    }
}

/// The right to move the clock, which all tests share.
pub(crate) struct Clock {
    _held: MutexGuard<'static, ()>,
}

impl Clock {
    pub(crate) fn hold() -> Self {
        static CLOCK: Mutex<()> = Mutex::new(());
        loop {
            match CLOCK.try_lock() {
                Ok(held) => return Self { _held: held },
                Err(TryLockError::Poisoned(poisoned)) => return Self { _held: poisoned.into_inner() },
                Err(TryLockError::WouldBlock) => assert!(!HANGS.load(SeqCst), "another test hangs"),
            }
            thread::yield_now();
        }
    }

    #[expect(clippy::unused_self, reason = "only who holds the clock moves it")]
    pub(crate) fn advance(&self, nanos: Nanos) {
        clock::advance(Duration::from_nanos(nanos));
        // Else it would sleep on for as long as the clock said that it had to.
        expiry::wake_now();
    }
}

/// Keys are numbers. Each woken thread wakes `FAN` more.
pub(crate) struct Plain<const FAN: usize = 1>;

pub(crate) struct Outcome {
    pub(crate) value: u64,
    dropped: Option<Sender<u64>>,
}

impl Outcome {
    pub(crate) fn new(value: u64) -> Self {
        Self { value, dropped: None }
    }

    /// One that says when it is dropped.
    pub(crate) fn watched(value: u64, dropped: &Sender<u64>) -> Self {
        Self { value, dropped: Some(dropped.clone()) }
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if let Some(dropped) = &self.dropped {
            // The test may have ended.
            let _ = dropped.send(self.value);
        }
    }
}

/// A waiter of an event loop that is only a number. Says so when it is woken.
pub(crate) struct Task {
    name: u64,
    woken: Sender<u64>,
    /// Whether its loop is closed.
    lost: bool,
}

/// Makes tasks and tells which of them have been woken.
pub(crate) struct Tasks {
    sender: Sender<u64>,
    woken: Receiver<u64>,
}

impl Tasks {
    pub(crate) fn new() -> Self {
        let (sender, woken) = mpsc::channel();
        Self { sender, woken }
    }

    pub(crate) fn task(&self, name: u64) -> Task {
        Task { name, woken: self.sender.clone(), lost: false }
    }

    /// One whose loop is closed.
    pub(crate) fn lost(&self, name: u64) -> Task {
        Task { lost: true, ..self.task(name) }
    }

    /// Those that were woken since the last look, by name; one that was woken twice is there twice.
    pub(crate) fn woken(&self) -> Vec<u64> {
        let mut names: Vec<_> = self.woken.try_iter().collect();
        names.sort_unstable();
        names
    }

    /// Waits for the next one.
    pub(crate) fn next(&self) -> u64 {
        self.woken.recv().expect("a sender is held right here")
    }
}

/// The task of a call that runs on an event loop.
#[derive(Default)]
pub(crate) struct Call {
    cancelled: AtomicBool,
    lost: AtomicBool,
}

impl Call {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn cancelled(&self) -> bool {
        self.cancelled.load(SeqCst)
    }

    /// Its loop is closed.
    pub(crate) fn lose(&self) {
        self.lost.store(true, SeqCst);
    }
}

impl<const FAN: usize> Family for Plain<FAN> {
    type Key = u64;
    type Outcome = Outcome;
    type Error = Infallible;
    type Task = Task;
    type Call = Arc<Call>;

    fn wake_fan() -> usize {
        FAN
    }

    fn same(stored: &u64, wanted: &u64) -> Result<bool, Infallible> {
        Ok(stored == wanted)
    }

    fn wake_tasks(waiters: Vec<Arc<Waiter<Self>>>) {
        for task in waiters.iter().filter_map(|waiter| waiter.task()) {
            // The test may have ended.
            let _ = task.woken.send(task.name);
        }
    }

    fn share_call(call: &Arc<Call>) -> Arc<Call> {
        Arc::clone(call)
    }

    fn cancel_call(call: Arc<Call>) {
        assert!(!call.cancelled.swap(true, SeqCst), "a call was cancelled twice");
    }

    fn task_is_lost(task: &Self::Task) -> bool {
        task.lost
    }

    fn report_over_age(name: Option<&str>, key: &u64, age: Duration) {
        ops::note_report(name, *key, age);
    }

    fn call_is_lost(call: &Arc<Call>) -> bool {
        call.lost.load(SeqCst)
    }
}

pub(crate) fn hash(key: u64) -> u64 {
    key.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// What a request has to do next.
pub(crate) enum Turn<F: Family> {
    Hit(u64),
    Join(Arc<Flight<F>>),
    Lead(Lead<F>),
}

pub(crate) fn turn<const FAN: usize>(map: &Arc<Map<Plain<FAN>>>, key: u64) -> Turn<Plain<FAN>> {
    turn_on(map, key, NO_LOOP)
}

/// The same for a request of an event loop.
pub(crate) fn turn_on<const FAN: usize>(
    map: &Arc<Map<Plain<FAN>>>,
    key: u64,
    loop_id: LoopId,
) -> Turn<Plain<FAN>> {
    loop {
        match find(map, key) {
            Found::Hit(value) => return Turn::Hit(value),
            Found::Pending(flight) => return Turn::Join(flight),
            Found::Nothing => {
                let Ok(lead) = map.claim(hash(key), key, Origin { loop_id, thread: 0 });
                if let Some(lead) = lead {
                    return Turn::Lead(lead);
                }
            }
        }
    }
}

fn find<const FAN: usize>(map: &Map<Plain<FAN>>, key: u64) -> Found<Plain<FAN>, u64> {
    let Ok(found) = map.find(hash(key), &key, |outcome, _| outcome.value);
    found
}

pub(crate) fn hit<const FAN: usize>(map: &Map<Plain<FAN>>, key: u64) -> Option<u64> {
    if let Found::Hit(value) = find(map, key) { Some(value) } else { None }
}

pub(crate) fn contains<const FAN: usize>(map: &Map<Plain<FAN>>, key: u64) -> bool {
    let Ok(contains) = map.contains(hash(key), &key);
    contains
}

/// A turn that must be the leader's.
pub(crate) fn lead<const FAN: usize>(map: &Arc<Map<Plain<FAN>>>, key: u64) -> Lead<Plain<FAN>> {
    lead_on(map, key, NO_LOOP)
}

/// The same, for a call that runs on an event loop.
pub(crate) fn lead_on<const FAN: usize>(
    map: &Arc<Map<Plain<FAN>>>,
    key: u64,
    loop_id: LoopId,
) -> Lead<Plain<FAN>> {
    match turn_on(map, key, loop_id) {
        Turn::Lead(lead) => lead,
        Turn::Hit(value) => panic!("{value} is retained"),
        Turn::Join(_) => panic!("another leads"),
    }
}

/// The flight that a turn must find under way.
pub(crate) fn flight<const FAN: usize>(map: &Arc<Map<Plain<FAN>>>, key: u64) -> Arc<Flight<Plain<FAN>>> {
    match turn(map, key) {
        Turn::Join(flight) => flight,
        Turn::Hit(value) => panic!("{value} is retained"),
        Turn::Lead(_) => panic!("nobody leads"),
    }
}

/// A place for this thread in the flight that is under way.
pub(crate) fn join<const FAN: usize>(map: &Arc<Map<Plain<FAN>>>, key: u64) -> Place<Plain<FAN>> {
    let flight = flight(map, key);
    map.join(&flight, NO_LOOP, Wakeup::this_thread()).expect("the flight is under way")
}

/// A place for a task in the flight that is under way.
pub(crate) fn join_as(map: &Arc<Map<Plain>>, key: u64, loop_id: LoopId, task: Task) -> Place<Plain> {
    let flight = flight(map, key);
    map.join(&flight, loop_id, Wakeup::Task(task)).expect("the flight is under way")
}

/// The outcome of a place whose flight has landed.
pub(crate) fn read<const FAN: usize>(place: &Place<Plain<FAN>>) -> u64 {
    assert_eq!(place.standing(), Standing::Landed);
    place.outcome().expect("it has landed").value
}

/// How a request was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    Led,
    Joined(u64),
    Hit(u64),
}

/// What a blocking caller does: leads with `call`, or waits for who does.
pub(crate) fn request<const FAN: usize>(
    map: &Arc<Map<Plain<FAN>>>,
    key: u64,
    call: impl FnOnce(Lead<Plain<FAN>>),
) -> Served {
    loop {
        match turn(map, key) {
            Turn::Hit(value) => return Served::Hit(value),
            Turn::Lead(lead) => {
                call(lead);
                return Served::Led;
            }
            Turn::Join(flight) => {
                let Some(place) = map.join(&flight, NO_LOOP, Wakeup::this_thread()) else { continue };
                match place.wait(None) {
                    Standing::Landed => {
                        place.count_joined();
                        place.pass_baton();
                        return Served::Joined(read(&place));
                    }
                    Standing::Offered => {
                        call(place.take_lead(0).expect("it was offered to this thread"));
                        return Served::Led;
                    }
                    other => panic!("a waiting thread became {other:?}"),
                }
            }
        }
    }
}
