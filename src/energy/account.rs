//! Energy as it runs up, shared among those who run at the time.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Kind, Meter, Reading, counted};

/// How often meters are read where nobody begins or ends.
const INTERVAL: Duration = Duration::from_millis(100);

/// What meters count from when it was opened on.
///
/// Whoever runs has a [`Share`]. The joules between two readings are divided among the shares that were open in
/// between, by how long they were; what flows while none is open belongs to nobody.
pub struct Account {
    inner: Arc<Inner>,
    reader: Option<JoinHandle<()>>,
}

struct Inner {
    state: Mutex<State>,
    closed: Condvar,
}

struct State {
    meters: Vec<(Box<dyn Meter>, Reading)>,
    joules: f64,
    /// What each share has had until `divided`, and when it was opened.
    shares: HashMap<u64, (f64, Instant)>,
    divided: Instant,
    next: u64,
    /// Whether a meter failed: what was consumed since is unknown.
    is_lost: bool,
    is_closed: bool,
}

/// The energy of one who runs.
pub struct Share {
    inner: Arc<Inner>,
    id: u64,
}

impl Account {
    /// Opens an account with those of the meters that count nothing twice ([`counted`]). `None` if there is none, or
    /// none that can be read.
    pub fn open(meters: Vec<Box<dyn Meter>>) -> Option<Self> {
        let infos: Vec<_> = meters.iter().map(|meter| meter.info()).collect();
        let is_counted = if infos.is_empty() { Vec::new() } else { counted(&infos) };
        let meters = meters.into_iter().zip(is_counted).filter(|(_, is_counted)| *is_counted);
        let meters: Vec<_> = meters
            .map(|(mut meter, _)| meter.read().ok().map(|reading| (meter, reading)))
            .collect::<Option<_>>()?;
        if meters.is_empty() {
            return None;
        }
        let state = State {
            meters,
            joules: 0.0,
            shares: HashMap::new(),
            divided: Instant::now(),
            next: 0,
            is_lost: false,
            is_closed: false,
        };
        let inner = Arc::new(Inner { state: Mutex::new(state), closed: Condvar::new() });
        let read = inner.clone();
        let reader = std::thread::Builder::new().name("mtad energy".to_owned());
        let reader = reader.spawn(move || read.read_until_closed()).ok()?;
        Some(Account { inner, reader: Some(reader) })
    }

    /// Joules since it was opened; `None` once a meter has failed.
    pub fn joules(&self) -> Option<f64> {
        let mut state = self.inner.lock();
        state.divide();
        (!state.is_lost).then_some(state.joules)
    }

    /// Opens a share.
    pub fn share(&self) -> Share {
        let mut state = self.inner.lock();
        state.divide();
        let id = state.next;
        state.next += 1;
        let now = state.divided;
        state.shares.insert(id, (0.0, now));
        Share { inner: self.inner.clone(), id }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.inner.lock().is_closed = true;
        self.inner.closed.notify_all();
        if let Some(reader) = self.reader.take() {
            // It has nothing to say.
            let _ = reader.join();
        }
    }
}

impl Share {
    /// Its joules so far; `None` once a meter has failed.
    pub fn joules(&self) -> Option<f64> {
        let mut state = self.inner.lock();
        state.divide();
        let joules = state.shares.get(&self.id).map(|(joules, _)| *joules);
        joules.filter(|_| !state.is_lost)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        state.divide();
        state.shares.remove(&self.id);
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_until_closed(&self) {
        let mut state = self.lock();
        while !state.is_closed {
            let waited = self.closed.wait_timeout(state, INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.divide();
        }
    }
}

impl State {
    /// Reads the meters and divides what they counted since the last time.
    fn divide(&mut self) {
        let mut joules = 0.0;
        for (meter, last) in &mut self.meters {
            let Ok(reading) = meter.read() else {
                self.is_lost = true;
                return;
            };
            joules += match meter.info().kind {
                Kind::Energy => (reading.value - last.value).max(0.0),
                Kind::Power => {
                    let seconds = reading.at.saturating_duration_since(last.at).as_secs_f64();
                    seconds * (reading.value + last.value) / 2.0
                }
            };
            *last = reading;
        }
        let now = Instant::now();
        let since = std::mem::replace(&mut self.divided, now);
        self.joules += joules;
        let seconds = |opened: Instant| (now - opened.max(since)).as_secs_f64();
        let all: f64 = self.shares.values().map(|(_, opened)| seconds(*opened)).sum();
        if all > 0.0 {
            for (had, opened) in self.shares.values_mut() {
                *had += joules * seconds(*opened) / all;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy::{Assumed, Info, Unavailable};

    #[test]
    fn what_flows_is_divided_among_those_who_run() {
        let account = Account::open(vec![Box::new(Assumed::new(1000.0).unwrap())]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let (first, begun) = (account.share(), Instant::now());
        std::thread::sleep(Duration::from_millis(30));
        let alone = first.joules().unwrap();
        let second = account.share();
        std::thread::sleep(Duration::from_millis(50));
        let (a, b) = (first.joules().unwrap(), second.joules().unwrap());
        let flowed = 1000.0 * begun.elapsed().as_secs_f64();
        assert!(alone >= 30.0 && b >= 25.0, "{alone} {b}");
        // Each has half of what flowed while both ran, and nothing is counted twice.
        assert!((a - alone - b).abs() < 0.2 * b, "{alone} {a} {b}");
        assert!(a + b <= flowed, "{a} + {b} of {flowed}");
        assert!(account.joules().unwrap() >= a + b + 20.0);
    }

    struct Failing(Info, u32);

    impl Meter for Failing {
        fn info(&self) -> &Info {
            &self.0
        }

        fn read(&mut self) -> Result<Reading, Unavailable> {
            self.1 += 1;
            match self.1 {
                1 => Ok(Reading::since(Instant::now(), 5.0)),
                _ => Err(Unavailable::new("unplugged")),
            }
        }
    }

    #[test]
    fn what_a_lost_meter_would_have_counted_is_unknown() {
        assert!(Account::open(Vec::new()).is_none());
        let info = Assumed::new(1.0).unwrap().info().clone();
        let account = Account::open(vec![Box::new(Failing(info, 0))]).unwrap();
        let share = account.share();
        assert_eq!((share.joules(), account.joules()), (None, None));
    }
}
