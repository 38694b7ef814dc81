//! What happens next: a heap of when, over events that stay where they were put.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::event::Event;

/// The queue of events.
#[derive(Default)]
pub struct Queue {
    /// When, its number (two at one time happen as they were put in), and which of `events`.
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    /// What waits, each where it stays; `free` are the empty places.
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    sequence: u64,
}

impl Queue {
    /// Puts something in, to happen at that time, µs.
    pub fn push(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        let place = match self.free.pop() {
            Some(place) => {
                self.events[place] = Some(event);
                place
            }
            None => {
                self.events.push(Some(event));
                self.events.len() - 1
            }
        };
        self.heap.push(Reverse((at, self.sequence, place)));
    }

    /// Takes out what happens next, and when.
    pub fn pop(&mut self) -> Option<(u64, Event)> {
        let Reverse((at, _, place)) = self.heap.pop()?;
        self.free.push(place);
        let event = self.events[place].take()?;
        Some((at, event))
    }
}
