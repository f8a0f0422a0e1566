//! A stream that many read: a log of its items, through which each reader goes with a cursor of its own.
//!
//! 1. One source appends, and no reader holds it up. It is a task or thread that does nothing else, or whichever reader
//!    is at the front and finds nobody pulling ([`Turn::Pull`]).
//! 2. As long as the stream can be joined, the log holds every item. Once it has grown beyond its bound, nobody can join
//!    any more, and an item leaves when all readers have passed it, or when there are too many behind it.
//! 3. A stream ends once. What was appended by then is read first.
//! 4. The last reader to leave ends a stream that is under way, unless it is to finish without readers, for later ones.
//! 5. A waiter is on the list exactly as long as its fate is `Waiting`.

use std::collections::VecDeque;
use std::time::Duration;

use crate::aftermath::Wake;
use crate::family::Family;
use crate::fork;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, park_until};
use crate::waiter::{Chain, Fate, LoopId, NO_LOOP, Waiter, Wakeup};

/// How many items a reader takes at once, so that one that is far behind does not hold them all.
const MOST_AT_ONCE: usize = 64;

/// How a stream ended.
pub enum End<F: Family> {
    Finished,
    /// Its readers share this error.
    Failed(F::Outcome),
    /// In a way that readers do not share. Who has read nothing starts over; the others get this error, or one of the
    /// reader's own making.
    Broken(Option<F::Outcome>),
}

/// What there is for a reader to do.
pub enum Turn<R> {
    /// The next items, at least one.
    Items(Vec<R>),
    /// Wait.
    Wait,
    /// Pull the next item for all: [`Stream::append`], [`Stream::end`] or [`Stream::release`] is this reader's duty now.
    Pull,
    Finished,
    Failed(R),
    /// The stream is over, and this reader has nothing of it: look for another one.
    StartOver,
    /// It has ended without an end that can be shared.
    Broken(Option<R>),
    /// So many items that this reader has not read have left the log.
    Lagged(u64),
}

/// What the source has to know after it has appended an item.
#[derive(Debug, PartialEq, Eq)]
pub struct Appended {
    /// From now on nobody can join: the map lets go of the stream.
    pub closed: bool,
    /// Somebody waited for the item.
    pub awaited: bool,
}

pub struct Stream<F: Family> {
    birth: u32,
    /// How many items the log holds at most, once it cannot be joined.
    most: usize,
    /// Whether it goes on without readers; changed under the log's mutex.
    finishes: AtomicBool,
    log: Mutex<Log<F>>,
}

struct Log<F: Family> {
    items: VecDeque<F::Outcome>,
    /// How many items have left.
    first: u64,
    /// How many readers have this item next, for each item of the log; the last number is of those at the front.
    next_at: VecDeque<u32>,
    readers: u32,
    waiting: Vec<Arc<Waiter<F>>>,
    /// Whether somebody pulls.
    pulled: bool,
    open: bool,
    end: Option<End<F>>,
}

impl<F: Family> Log<F> {
    fn front(&self) -> u64 {
        self.first + self.items.len() as u64
    }

    /// The place of a cursor in `next_at`; `None` if its item has left.
    fn place(&self, cursor: u64) -> Option<usize> {
        cursor.checked_sub(self.first).and_then(|place| usize::try_from(place).ok())
    }

    fn move_cursor(&mut self, from: u64, to: Option<u64>) {
        if let Some(place) = self.place(from) {
            self.next_at[place] -= 1;
        }
        if let Some(place) = to.and_then(|to| self.place(to)) {
            self.next_at[place] += 1;
        }
    }

    /// Takes out what need not be kept any more, to be dropped by the caller once the log is unlocked.
    fn trim(&mut self, most: usize) -> Vec<F::Outcome> {
        let mut gone = Vec::new();
        while !self.open && (self.items.len() > most || self.next_at.front() == Some(&0)) {
            let Some(item) = self.items.pop_front() else { break };
            gone.push(item);
            self.next_at.pop_front();
            self.first += 1;
        }
        gone
    }

    /// Whether nobody reads it, nor ever will.
    fn is_out_of_reach(&self) -> bool {
        self.readers == 0 && !self.open
    }

    /// Takes a waiter off the list, whose caller holds it, too.
    fn strike(&mut self, waiter: Option<&Arc<Waiter<F>>>) {
        // Rule 5: no need to look for one that was woken.
        let Some(waiter) = waiter.filter(|waiter| waiter.fate() == Fate::Waiting) else { return };
        if let Some(place) = self.waiting.iter().position(|other| Arc::ptr_eq(other, waiter)) {
            self.waiting.swap_remove(place);
        }
    }

    /// Takes all that wait off the list.
    fn wake_all(&mut self) -> Wake<F> {
        let (tasks, threads): (Vec<_>, Vec<_>) =
            self.waiting.drain(..).partition(|waiter| waiter.task().is_some());
        let link = |threads: Vec<_>| (!threads.is_empty()).then(|| Chain::link(threads));
        let wake = Wake { threads: link(threads.clone()), one: None, tasks };
        for waiter in threads.iter().chain(&wake.tasks) {
            waiter.set_fate(Fate::Withdrawn);
        }
        wake
    }
}

impl<F: Family> Stream<F> {
    /// One with its first reader. If it is `pumped`, its readers never pull.
    pub fn begin(most: usize, finishes: bool, pumped: bool) -> (Arc<Self>, Reader<F>) {
        let log = Log {
            items: VecDeque::new(),
            first: 0,
            next_at: VecDeque::from([1]),
            readers: 1,
            waiting: Vec::new(),
            pulled: pumped,
            open: true,
            end: None,
        };
        let finishes = AtomicBool::new(finishes);
        let stream = Arc::new(Self { birth: fork::birth(), most, finishes, log: Mutex::new(log) });
        let reader = Reader::new(&stream);
        (stream, reader)
    }

    /// Another reader, from the first item on. `None` if the stream can no longer be joined.
    pub fn join(self: &Arc<Self>) -> Option<Reader<F>> {
        let mut log = self.log.lock();
        if !log.open || self.is_inherited() && log.end.is_none() {
            return None;
        }
        log.readers += 1;
        log.next_at[0] += 1;
        drop(log);
        Some(Reader::new(self))
    }

    /// Whether whoever pulls has stayed behind in the parent of a fork.
    fn is_inherited(&self) -> bool {
        self.birth != fork::birth()
    }

    /// How many readers there are.
    pub fn readers(&self) -> usize {
        self.log.lock().readers as usize
    }

    /// How many readers wait for the next item.
    pub fn waiting(&self) -> usize {
        self.log.lock().waiting.len()
    }

    /// Adds an item; with `release`, by a reader that has pulled it and is done with that. Gives the item back if the
    /// stream is over.
    pub fn append(&self, item: F::Outcome, release: bool) -> Result<Appended, F::Outcome> {
        let mut log = self.log.lock();
        if log.end.is_none() && log.is_out_of_reach() {
            log.end = Some(End::Broken(None));
        }
        if log.end.is_some() {
            return Err(item);
        }
        log.items.push_back(item);
        log.next_at.push_back(0);
        let closed = log.open && log.items.len() > self.most;
        log.open &= !closed;
        log.pulled &= !release;
        let gone = log.trim(self.most);
        let wake = log.wake_all();
        drop(log);
        let awaited = wake.is_for_somebody();
        wake.now();
        drop(gone);
        Ok(Appended { closed, awaited })
    }

    /// From now on it goes on without readers.
    pub fn see_through(&self) {
        let log = self.log.lock();
        self.finishes.store(true, Ordering::Relaxed);
        drop(log);
    }

    /// Gives back the duty to pull.
    pub fn release(&self) {
        let mut log = self.log.lock();
        log.pulled = false;
        let wake = log.wake_all();
        drop(log);
        wake.now();
    }

    /// Ends the stream. False if it is over already.
    pub fn end(&self, end: End<F>) -> bool {
        let mut log = self.log.lock();
        if log.end.is_some() {
            drop(log);
            drop(end);
            return false;
        }
        if let End::Broken(_) = end {
            log.open = false;
        }
        log.end = Some(end);
        let gone = log.trim(self.most);
        let wake = log.wake_all();
        drop(log);
        wake.now();
        drop(gone);
        true
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.log.lock().end.is_some()
    }

    /// Shows the tasks that wait, for the garbage collector.
    pub fn for_each_task(&self, look: impl FnMut(&F::Task)) {
        self.log.lock().waiting.iter().filter_map(|waiter| waiter.task()).for_each(look);
    }

    /// Shows the items and the error, for the garbage collector.
    pub fn for_each(&self, mut look: impl FnMut(&F::Outcome)) {
        let log = self.log.lock();
        log.items.iter().for_each(&mut look);
        if let Some(End::Failed(error) | End::Broken(Some(error))) = &log.end {
            look(error);
        }
    }
}

/// One of those that read a stream. Dropping it leaves the stream.
pub struct Reader<F: Family> {
    stream: Arc<Stream<F>>,
    /// The number of its next item; changed under the log's mutex.
    cursor: AtomicU64,
    left: AtomicBool,
    /// The task that waits for it, or has waited.
    task: Mutex<Option<Arc<Waiter<F>>>>,
}

impl<F: Family> Reader<F> {
    fn new(stream: &Arc<Stream<F>>) -> Self {
        let (cursor, left) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { stream: Arc::clone(stream), cursor, left, task: Mutex::new(None) }
    }

    pub fn stream(&self) -> &Arc<Stream<F>> {
        &self.stream
    }

    /// What there is to do. `share` is called with the log locked: it only counts references.
    pub fn take<R>(&self, share: impl Fn(&F::Outcome) -> R) -> Turn<R> {
        let stream = &*self.stream;
        let mut log = stream.log.lock();
        // Relaxed, here and below: the mutex orders it.
        let cursor = self.cursor.load(Ordering::Relaxed);
        if self.left.load(Ordering::Relaxed) {
            return Turn::Broken(None);
        }
        let Some(place) = log.place(cursor) else {
            return Turn::Lagged(log.first - cursor);
        };
        if place < log.items.len() {
            let items: Vec<_> = log.items.range(place..).take(MOST_AT_ONCE).map(share).collect();
            let next = cursor + items.len() as u64;
            log.move_cursor(cursor, Some(next));
            self.cursor.store(next, Ordering::Relaxed);
            let gone = log.trim(stream.most);
            drop(log);
            drop(gone);
            return Turn::Items(items);
        }
        match &log.end {
            Some(End::Finished) => Turn::Finished,
            Some(End::Failed(error)) => Turn::Failed(share(error)),
            Some(End::Broken(_)) if cursor == 0 => Turn::StartOver,
            Some(End::Broken(error)) => Turn::Broken(error.as_ref().map(share)),
            None if stream.is_inherited() => {
                if cursor == 0 {
                    Turn::StartOver
                } else {
                    Turn::Broken(None)
                }
            }
            None if log.pulled => Turn::Wait,
            None => {
                log.pulled = true;
                Turn::Pull
            }
        }
    }

    /// Has a task woken when there is something to do for it. False if there is already.
    pub fn await_more(&self, loop_id: LoopId, task: F::Task) -> bool {
        let waiter = Waiter::new(loop_id, Wakeup::Task(task));
        let before = self.task.lock().replace(Arc::clone(&waiter));
        if before.as_ref().is_some_and(|before| before.fate() == Fate::Waiting) {
            self.stream.log.lock().strike(before.as_ref());
        }
        drop(before);
        self.enlist(waiter)
    }

    /// A wait of this thread; `None` if there is something to do for it already.
    pub fn wait_here(&self) -> Option<Waiting<'_, F>> {
        let waiter = Waiter::new(NO_LOOP, Wakeup::this_thread());
        self.enlist(Arc::clone(&waiter)).then(|| Waiting { stream: &self.stream, waiter })
    }

    fn enlist(&self, waiter: Arc<Waiter<F>>) -> bool {
        let mut log = self.stream.log.lock();
        let at_front = self.cursor.load(Ordering::Relaxed) == log.front();
        let waits = at_front && log.pulled && log.end.is_none() && !self.stream.is_inherited();
        let refused = if waits {
            log.waiting.push(waiter);
            None
        } else {
            Some(waiter)
        };
        drop(log);
        refused.is_none()
    }

    /// Leaves the stream. True for the last one, if that ends the stream: then its source is to be closed.
    pub fn leave(&self) -> bool {
        let stream = &*self.stream;
        let task = self.task.lock().take();
        let mut log = stream.log.lock();
        if self.left.swap(true, Ordering::Relaxed) {
            return false;
        }
        log.strike(task.as_ref());
        log.readers -= 1;
        let cursor = self.cursor.load(Ordering::Relaxed);
        log.move_cursor(cursor, None);
        let unwanted = log.readers == 0 && !stream.finishes.load(Ordering::Relaxed) || log.is_out_of_reach();
        let last = unwanted && log.end.is_none();
        if last {
            log.end = Some(End::Broken(None));
            log.open = false;
        }
        let gone = log.trim(stream.most);
        // Of the last one there can be a thread that waits while another leaves for it.
        let wake = if last { log.wake_all() } else { Wake::nobody() };
        drop(log);
        wake.now();
        drop((gone, task));
        last
    }
}

impl<F: Family> Drop for Reader<F> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A reader whose thread waits. Dropping it ends the wait.
pub struct Waiting<'a, F: Family> {
    stream: &'a Stream<F>,
    waiter: Arc<Waiter<F>>,
}

impl<F: Family> Waiting<'_, F> {
    /// Blocks this thread until there is something to do for it. False if `limit` has passed before.
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        park_until(limit, || self.waiter.fate() != Fate::Waiting)
    }
}

impl<F: Family> Drop for Waiting<'_, F> {
    fn drop(&mut self) {
        let mut log = self.stream.log.lock();
        log.strike(Some(&self.waiter));
        drop(log);
        // Others count on being woken by one that was.
        self.waiter.pass_baton();
    }
}
