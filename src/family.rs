//! What the core asks of the language above it.

use std::time::Duration;

use crate::sync::Arc;
use crate::waiter::Waiter;

/// The types of one kind of coalescer and what the core cannot do for itself with them.
///
/// No function here is called while a mutex of the core is held, but for [`Family::share_call`].
pub trait Family: Sized + 'static {
    type Key: Send + Sync;
    type Outcome: Send + Sync;
    /// Why two keys could not be compared.
    type Error;
    /// A waiter that is a task of an event loop: what wakes it.
    type Task: Send + Sync;
    /// The call's own task of a flight that is led on an event loop.
    type Call: Send + Sync;

    /// How many waiting threads each woken one wakes in turn. One where only one of them can run at a time, two
    /// where they run in parallel.
    fn wake_fan() -> usize;

    /// Equality of keys. It may fail, block, and come back to the map.
    fn same(stored: &Self::Key, wanted: &Self::Key) -> Result<bool, Self::Error>;

    /// Wakes tasks, each on its own loop.
    fn wake_tasks(waiters: Vec<Arc<Waiter<Self>>>);
    /// Whether a task can never run again, because its loop is closed.
    fn task_is_lost(task: &Self::Task) -> bool;
    /// Another handle to the same call; called under the flight's mutex, so it must only count references.
    fn share_call(call: &Self::Call) -> Self::Call;
    /// Cancels a call that nobody waits for any more.
    fn cancel_call(call: Self::Call);
    /// Tells the operator of a flight of the map of this name that is over age. Called by the sweeper.
    fn report_over_age(_name: Option<&str>, _key: &Self::Key, _age: Duration) {}
    /// Whether the call can never finish, because its loop is closed or its task is gone.
    fn call_is_lost(call: &Self::Call) -> bool;
    /// Whether somebody besides the flight's waiters, and elsewhere than on the call's loop, depends on it; called under
    /// the flight's mutex.
    fn is_needed_elsewhere(_call: &Self::Call) -> bool {
        false
    }
    /// Tells those besides the flight's waiters that the call is lost.
    fn call_lost(_call: Self::Call) {}
}
