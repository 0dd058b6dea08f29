//! What shared memory is under `--cfg loom`: for each word a loom atomic beside it, for each range of plain bytes a
//! loom cell, so that the checker runs the rings through every order of accesses that the memory model allows.
//!
//! A test calls [`reset`], sets its rings up, and then covers them word by word and range by range, before it starts
//! a second thread. From the first cover on, every access must be covered: what would escape the checker is a panic.
//! The bytes of a covered word are no longer read; those of a range are, once the checker found no race.
//! Compiled into both crates, so the rings under test are the ones that ship.

use loom::cell::UnsafeCell;
use loom::sync::atomic as checked;
use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{self as plain, Ordering};

pub(crate) use checked::fence;

thread_local! {
    // All threads of a loom execution are coroutines of the thread that runs the test.
    static SHADOW: RefCell<Shadow> = RefCell::default();
}

#[derive(Default)]
struct Shadow {
    covers: bool,
    words: HashMap<usize, Rc<dyn Any>>,
    ranges: Vec<(Range<usize>, Rc<UnsafeCell<()>>)>,
}

/// Forgets all covers: to be called first in every execution.
pub(crate) fn reset() {
    SHADOW.take();
}

/// Covers one range of plain bytes. Accesses that touch any byte of it count as accesses to all of it.
pub(crate) fn cover_bytes(start: NonNull<u8>, len: usize) {
    let start = start.addr().get();
    let cell = Rc::new(UnsafeCell::new(()));
    SHADOW.with_borrow_mut(|shadow| {
        shadow.covers = true;
        shadow.ranges.push((start..start + len, cell));
    });
}

/// Plain bytes are about to be read.
#[track_caller]
pub(crate) fn reads(start: *const u8, len: usize) {
    for cell in cells(start.addr(), len) {
        cell.with(|_| ());
    }
}

/// Plain bytes are about to be written.
#[track_caller]
pub(crate) fn writes(start: *const u8, len: usize) {
    for cell in cells(start.addr(), len) {
        cell.with_mut(|_| ());
    }
}

#[track_caller]
fn cells(start: usize, len: usize) -> Vec<Rc<UnsafeCell<()>>> {
    let end = start + len;
    SHADOW.with_borrow(|shadow| {
        let mut covered = 0;
        let mut cells = Vec::new();
        for (range, cell) in &shadow.ranges {
            let overlap = range.end.min(end).saturating_sub(range.start.max(start));
            if overlap > 0 {
                covered += overlap;
                cells.push(Rc::clone(cell));
            }
        }
        assert!(
            !shadow.covers || covered == len,
            "{len} bytes at {start:#x} are not covered"
        );
        cells
    })
}

/// A word in shared memory: its loom atomic `A` if it is covered.
#[repr(transparent)]
pub(crate) struct Word<A: Checked>(A::Plain);

impl<A: Checked> Word<A> {
    /// Covers `count` words from `first` on. They keep the values they have.
    pub(crate) fn cover(first: NonNull<u8>, count: usize) {
        for index in 0..count {
            // SAFETY: the test names words of memory that it set up, aligned.
            let word = unsafe { first.cast::<A::Plain>().add(index).as_ref() };
            let cover: Rc<dyn Any> = Rc::new(A::new(A::peek(word)));
            SHADOW.with_borrow_mut(|shadow| {
                shadow.covers = true;
                shadow.words.insert(std::ptr::from_ref(word).addr(), cover);
            });
        }
    }

    /// `None` during the set-up, before anything is covered: nobody else is there yet.
    fn cover_of(&self) -> Option<Rc<A>> {
        let address = std::ptr::from_ref(self).addr();
        SHADOW.with_borrow(|shadow| {
            let cover = shadow.words.get(&address).cloned();
            assert!(
                !shadow.covers || cover.is_some(),
                "the word at {address:#x} is not covered"
            );
            cover.map(|cover| cover.downcast().expect("a word of one size"))
        })
    }

    #[track_caller]
    pub(crate) fn load(&self, ordering: Ordering) -> A::Value {
        match self.cover_of() {
            Some(cover) => cover.load(ordering),
            None => A::peek(&self.0),
        }
    }

    #[track_caller]
    pub(crate) fn store(&self, value: A::Value, ordering: Ordering) {
        match self.cover_of() {
            Some(cover) => cover.store(value, ordering),
            None => A::poke(&self.0, value),
        }
    }
}

/// A loom atomic, and the plain one that has its place in memory.
pub(crate) trait Checked: 'static {
    type Plain;
    type Value: Copy;

    fn peek(word: &Self::Plain) -> Self::Value;
    fn poke(word: &Self::Plain, value: Self::Value);
    fn new(value: Self::Value) -> Self;
    fn load(&self, ordering: Ordering) -> Self::Value;
    fn store(&self, value: Self::Value, ordering: Ordering);
}

macro_rules! checked {
    ($($name:ident: $value:ty),*) => {$(
        impl Checked for checked::$name {
            type Plain = plain::$name;
            type Value = $value;

            fn peek(word: &Self::Plain) -> $value {
                word.load(Ordering::Relaxed)
            }

            fn poke(word: &Self::Plain, value: $value) {
                word.store(value, Ordering::Relaxed);
            }

            fn new(value: $value) -> Self {
                checked::$name::new(value)
            }

            #[track_caller]
            fn load(&self, ordering: Ordering) -> $value {
                self.load(ordering)
            }

            #[track_caller]
            fn store(&self, value: $value, ordering: Ordering) {
                self.store(value, ordering);
            }
        }
    )*};
}

checked!(AtomicU16: u16, AtomicU32: u32, AtomicU64: u64);
