//! What a person should know of where models run: that a device did not do, that a file stays mapped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Hears notes, each once, on the thread on which it comes up.
pub type NoteListener = Arc<dyn Fn(&str) + Send + Sync>;

/// Notes, kept until somebody listens or asks.
#[derive(Default)]
pub(super) struct Notes {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    told: Vec<String>,
    /// How many of them were handed out.
    heard: usize,
    listener: Option<NoteListener>,
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells something, unless it was told before.
    pub fn tell(&self, note: String) {
        let mut state = self.lock();
        if state.told.contains(&note) {
            return;
        }
        state.told.push(note.clone());
        if let Some(listener) = state.listener.clone() {
            state.heard = state.told.len();
            // (A listener may ask for notes itself.)
            drop(state);
            listener(&note);
        }
    }

    /// Has all notes heard by `listener`: those that nobody has heard yet now, later ones as they come up.
    pub fn listen(&self, listener: NoteListener) {
        self.lock().listener = Some(listener.clone());
        self.take().iter().for_each(|note| listener(note));
    }

    /// The notes that nobody has heard yet.
    pub fn take(&self) -> Vec<String> {
        let mut state = self.lock();
        let unheard = state.told[state.heard..].to_vec();
        state.heard = state.told.len();
        unheard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_note_is_heard_once() {
        let notes = Notes::default();
        notes.tell("first".to_owned());
        notes.tell("first".to_owned());
        notes.tell("second".to_owned());
        assert_eq!(notes.take(), ["first", "second"]);
        notes.tell("third".to_owned());
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ear = heard.clone();
        notes.listen(Arc::new(move |note| ear.lock().unwrap().push(note.to_owned())));
        notes.tell("fourth".to_owned());
        notes.tell("second".to_owned());
        assert_eq!(*heard.lock().unwrap(), ["third", "fourth"]);
        assert!(notes.take().is_empty());
    }
}
