//! Keys to flights. Reading takes no lock, and electing the leader is one atomic operation.
//!
//! The table proper maps a hash to the few flights whose keys have it, nearly always one. So keys are compared here,
//! outside of the table's own operations, where a comparison may fail, block or come back to this table; and any
//! number of keys may share a hash, which the table itself does not bear (papaya 0.2.5 hangs when it iterates over some
//! 400 entries of one hash).

use crate::family::Family;
use crate::flight::Flight;
use crate::sync::Arc;

/// What became of an attempt to put a new flight into the table.
pub(crate) enum Claim<F: Family> {
    /// It is in; the flight that it replaces is out.
    Claimed { replaced: Option<Arc<Flight<F>>> },
    /// Another live flight has the key.
    Taken,
}

/// Looks for a key among flights of its hash.
fn position<F: Family>(flights: &[Arc<Flight<F>>], key: &F::Key) -> Result<Option<usize>, F::Error> {
    for (place, flight) in flights.iter().enumerate() {
        if F::same(flight.key(), key)? {
            return Ok(Some(place));
        }
    }
    Ok(None)
}

#[cfg(not(loom))]
pub(crate) use lock_free::Table;
#[cfg(loom)]
pub(crate) use locked::Table;

#[cfg(not(loom))]
mod lock_free {
    use std::hash::{BuildHasherDefault, Hasher};
    use std::slice;

    use papaya::{Compute, Guard, HashMap, LocalGuard, Operation, ResizeMode};

    use super::{Arc, Claim, Family, Flight, position};
    use crate::stats::cpus;

    pub(crate) struct Table<F: Family> {
        chains: HashMap<u64, Chain<F>, BuildHasherDefault<HashAsIs>>,
        /// How many readers a flush can bear, see [`release`](Self::release).
        readers: usize,
    }

    /// The flights of one hash. Never changed in place: a new chain takes its place.
    enum Chain<F: Family> {
        One(Arc<Flight<F>>),
        Many(Arc<[Arc<Flight<F>>]>),
    }

    impl<F: Family> Clone for Chain<F> {
        fn clone(&self) -> Self {
            match self {
                Self::One(flight) => Self::One(Arc::clone(flight)),
                Self::Many(flights) => Self::Many(Arc::clone(flights)),
            }
        }
    }

    impl<F: Family> Chain<F> {
        #[inline]
        fn flights(&self) -> &[Arc<Flight<F>>] {
            match self {
                Self::One(flight) => slice::from_ref(flight),
                Self::Many(flights) => flights,
            }
        }

        /// What is there without the flight at `except`, and with `more`. `None` for an empty chain.
        fn of(
            there: &[Arc<Flight<F>>],
            except: Option<usize>,
            more: Option<&Arc<Flight<F>>>,
        ) -> Option<Self> {
            if there.len() == usize::from(except.is_some()) {
                return more.map(|flight| Self::One(Arc::clone(flight)));
            }
            let kept = there.iter().enumerate().filter(|&(place, _)| Some(place) != except);
            let flights: Vec<_> = kept.map(|(_, flight)| flight).chain(more).map(Arc::clone).collect();
            match &flights[..] {
                [only] => Some(Self::One(Arc::clone(only))),
                _ => Some(Self::Many(flights.into())),
            }
        }
    }

    /// Hands on the hash that a key brings along.
    #[derive(Default)]
    pub(crate) struct HashAsIs(u64);

    impl Hasher for HashAsIs {
        #[inline]
        fn finish(&self) -> u64 {
            self.0
        }

        fn write(&mut self, bytes: &[u8]) {
            for &byte in bytes {
                self.0 = self.0.rotate_left(8) ^ u64::from(byte);
            }
        }

        #[inline]
        fn write_u64(&mut self, hash: u64) {
            self.0 = hash;
        }
    }

    impl<F: Family> Table<F> {
        pub(crate) fn new() -> Self {
            // Not incremental: what is removed while a table is copied bit by bit stays until the old table is dropped, and
            // that waits for the thread that has finished the copy to come back.
            let chains = HashMap::builder()
                .hasher(BuildHasherDefault::default())
                .resize_mode(ResizeMode::Blocking)
                .build();
            Self { chains, readers: 2 * cpus() }
        }

        /// Reads the flight of a key while the table keeps it alive. `look` gets the thread's number, too.
        #[inline]
        pub(crate) fn read<R>(
            &self,
            hash: u64,
            key: &F::Key,
            look: impl FnOnce(&Arc<Flight<F>>, usize) -> R,
        ) -> Result<Option<R>, F::Error> {
            let guard = self.chains.guard();
            let Some(chain) = self.chains.get(&hash, &guard) else { return Ok(None) };
            let found = match chain {
                Chain::One(flight) => F::same(flight.key(), key)?.then_some(flight),
                Chain::Many(flights) => position(flights, key)?.map(|place| &flights[place]),
            };
            Ok(found.map(|flight| look(flight, guard.thread_id())))
        }

        /// Puts a flight in, in the place of another of the same key if `gives_way` says so.
        pub(crate) fn insert(
            &self,
            flight: &Arc<Flight<F>>,
            gives_way: impl Fn(&Flight<F>) -> bool,
        ) -> Result<Claim<F>, F::Error> {
            let guard = self.chains.guard();
            // The key was not there a moment ago, mostly.
            let alone = Chain::One(Arc::clone(flight));
            if self.exchange(flight.hash(), None, Some(&alone), &guard) {
                return Ok(Claim::Claimed { replaced: None });
            }
            loop {
                let before = self.chains.get(&flight.hash(), &guard);
                let there = before.map_or(&[][..], Chain::flights);
                let place = position(there, flight.key())?;
                let replaced = place.map(|place| Arc::clone(&there[place]));
                if replaced.as_ref().is_some_and(|found| !gives_way(found)) {
                    return Ok(Claim::Taken);
                }
                let after = Chain::of(there, place, Some(flight));
                if self.exchange(flight.hash(), before, after.as_ref(), &guard) {
                    if replaced.is_some() {
                        self.release(&guard);
                    }
                    return Ok(Claim::Claimed { replaced });
                }
            }
        }

        /// Puts in a flight whose key is known not to be there.
        pub(crate) fn insert_other(&self, flight: &Arc<Flight<F>>) {
            let guard = self.chains.guard();
            loop {
                let before = self.chains.get(&flight.hash(), &guard);
                let after = Chain::of(before.map_or(&[][..], Chain::flights), None, Some(flight));
                if self.exchange(flight.hash(), before, after.as_ref(), &guard) {
                    return;
                }
            }
        }

        /// Keeps the table half empty, so that looking for a key that is not there is short.
        pub(crate) fn make_room(&self) {
            self.chains.reserve(self.chains.len() / 2, &self.chains.guard());
        }

        /// Removes this very flight. True if it was still there.
        ///
        /// What is removed is dropped once no reader can see it, by this thread if it [flushes](Self::flush).
        pub(crate) fn remove(&self, flight: &Arc<Flight<F>>) -> bool {
            let guard = self.chains.guard();
            loop {
                let Some(before) = self.chains.get(&flight.hash(), &guard) else { return false };
                let there = before.flights();
                let Some(place) = there.iter().position(|found| Arc::ptr_eq(found, flight)) else {
                    return false;
                };
                let after = Chain::of(there, Some(place), None);
                if self.exchange(flight.hash(), Some(before), after.as_ref(), &guard) {
                    return true;
                }
            }
        }

        /// Puts a chain in the place of another, if that is still there: one atomic operation.
        fn exchange(
            &self,
            hash: u64,
            before: Option<&Chain<F>>,
            after: Option<&Chain<F>>,
            guard: &LocalGuard<'_>,
        ) -> bool {
            // The guard keeps `before` alive, so that no other chain can have its address.
            let swap = |there: Option<(&u64, &Chain<F>)>| {
                let unchanged = match (there, before) {
                    (None, None) => true,
                    (Some((_, there)), Some(before)) => std::ptr::eq(there, before),
                    _ => false,
                };
                match after {
                    _ if !unchanged => Operation::Abort(()),
                    Some(chain) => Operation::Insert(chain.clone()),
                    None => Operation::Remove,
                }
            };
            !matches!(self.chains.compute(hash, swap, guard), Compute::Aborted(()))
        }

        /// Drops what this thread has removed, at once or when the readers that may see it are done.
        pub(crate) fn flush(&self) {
            self.release(&self.chains.guard());
        }

        /// What a thread has removed is handed on only together with an entry for each thread that reads at that moment
        /// (seize 0.5). Entries that mean nothing make up the number, so that one removal is enough.
        #[expect(unsafe_code, reason = "there is no safe way to retire what is no allocation")]
        fn release(&self, guard: &LocalGuard<'_>) {
            for _ in 0..self.readers {
                let nothing = std::ptr::NonNull::<u8>::dangling().as_ptr();
                // SAFETY: nothing is ever read from or done with the pointer.
                unsafe { guard.defer_retire(nothing, |_, _| ()) };
            }
            guard.flush();
        }

        pub(crate) fn for_each(&self, mut look: impl FnMut(&Arc<Flight<F>>)) {
            for (_, chain) in &self.chains.pin() {
                chain.flights().iter().for_each(&mut look);
            }
        }
    }
}

/// The same operations as one short critical section each, for loom.
#[cfg(loom)]
mod locked {
    use super::{Arc, Claim, Family, Flight, position};
    use crate::sync::Mutex;

    pub(crate) struct Table<F: Family>(Mutex<Vec<Arc<Flight<F>>>>);

    impl<F: Family> Table<F> {
        pub(crate) fn new() -> Self {
            Self(Mutex::new(Vec::new()))
        }

        pub(crate) fn read<R>(
            &self,
            _hash: u64,
            key: &F::Key,
            look: impl FnOnce(&Arc<Flight<F>>, usize) -> R,
        ) -> Result<Option<R>, F::Error> {
            let flights = self.0.lock().clone();
            let found = position(&flights, key)?.map(|place| &flights[place]);
            // Past every stripe that a thread has of its own.
            Ok(found.map(|flight| look(flight, usize::MAX)))
        }

        pub(crate) fn insert(
            &self,
            flight: &Arc<Flight<F>>,
            gives_way: impl Fn(&Flight<F>) -> bool,
        ) -> Result<Claim<F>, F::Error> {
            let mut flights = self.0.lock();
            let Some(place) = position(&flights, flight.key())? else {
                flights.push(Arc::clone(flight));
                return Ok(Claim::Claimed { replaced: None });
            };
            if !gives_way(&flights[place]) {
                return Ok(Claim::Taken);
            }
            let replaced = std::mem::replace(&mut flights[place], Arc::clone(flight));
            Ok(Claim::Claimed { replaced: Some(replaced) })
        }

        pub(crate) fn insert_other(&self, flight: &Arc<Flight<F>>) {
            self.0.lock().push(Arc::clone(flight));
        }

        pub(crate) fn make_room(&self) {}

        pub(crate) fn remove(&self, flight: &Arc<Flight<F>>) -> bool {
            let mut flights = self.0.lock();
            let place = flights.iter().position(|found| Arc::ptr_eq(found, flight));
            let removed = place.map(|place| flights.swap_remove(place));
            drop(flights);
            removed.is_some()
        }

        pub(crate) fn flush(&self) {}

        pub(crate) fn for_each(&self, look: impl FnMut(&Arc<Flight<F>>)) {
            let flights = self.0.lock().clone();
            flights.iter().for_each(look);
        }
    }
}
