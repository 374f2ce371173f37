//! Meters that are not the machine's own: a file that another program writes (`file:PATH`), or a
//! command (`cmd:COMMAND`) that prints readings, one to a line, such as `12.5 W` or `1034 J`.
//!
//! A command may print a reading and end, then it is run again and again; or go on printing, then
//! each line counts at the moment that it arrives. Units: W, mW, uW, kW for power; J, mJ, uJ, kJ,
//! Wh, mWh, kWh for energy since any moment. A number without a unit is refused: whoever takes
//! watts for joules gets figures that look right.
//!
//! On Unix a command and all that it starts are a process group, which ends with the meter, also
//! when this program is killed. (Elsewhere only the command itself is ended.)

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sysfs::Unwrapped;
use super::{Family, Found, Info, Kind, Meter, Reading, Scope, Unavailable};

/// How long the first reading may take, and how old the last one may be.
const PATIENCE: Duration = Duration::from_secs(10);

/// A command that ends is started this often.
const PERIOD: Duration = Duration::from_millis(500);

/// A longer line is no reading.
const LONGEST_LINE: u64 = 1024;

/// A line that was understood, or why not.
type Line = Result<(Kind, f64), Unavailable>;

/// Whether a name stands for a meter of this kind.
pub fn is_external(name: &str) -> bool {
    name.starts_with("cmd:") || name.starts_with("file:")
}

/// The meter that `cmd:COMMAND` or `file:PATH` stands for, if it gives a first reading.
pub fn open(name: &str) -> Found {
    let unavailable = |why| Found::Unavailable { name: name.to_owned(), why };
    if let Some(command) = name.strip_prefix("cmd:") {
        return match Printed::start(name, command) {
            Ok(meter) => Found::tried(meter),
            Err(why) => unavailable(why),
        };
    }
    let path = PathBuf::from(name.strip_prefix("file:").unwrap_or(name));
    match patiently(|| written(&path)) {
        Ok((kind, _)) => Found::tried(Written {
            info: info(name, kind, format!("the file {}", path.display())),
            path,
            counter: Unwrapped::default(),
        }),
        Err(why) => unavailable(why),
    }
}

fn info(name: &str, kind: Kind, source: String) -> Info {
    Info {
        name: name.to_owned(),
        family: Family::External,
        scope: Scope::System,
        covers: "whatever the external meter is connected to".to_owned(),
        kind,
        // Nothing is known of the device; how often its values change is seen as it runs.
        resolution: match kind {
            Kind::Energy => 0.0,
            Kind::Power => 0.1,
        },
        refresh: Duration::ZERO,
        interval: Duration::from_millis(10),
        source,
    }
}

/// A reading in joules or watts.
///
/// # Errors
/// The line is not a number with a known unit.
pub fn parse(line: &str) -> Line {
    let line = line.trim();
    let unit_at = line.find(|c: char| c.is_alphabetic() && c != 'e' && c != 'E');
    let (number, unit) = line.split_at(unit_at.unwrap_or(line.len()));
    let scale = match unit {
        "W" => (Kind::Power, 1.0),
        "mW" => (Kind::Power, 1e-3),
        "uW" | "µW" => (Kind::Power, 1e-6),
        "kW" => (Kind::Power, 1e3),
        "J" => (Kind::Energy, 1.0),
        "mJ" => (Kind::Energy, 1e-3),
        "uJ" | "µJ" => (Kind::Energy, 1e-6),
        "kJ" => (Kind::Energy, 1e3),
        "mWh" => (Kind::Energy, 3.6),
        "Wh" => (Kind::Energy, 3600.0),
        "kWh" => (Kind::Energy, 3.6e6),
        _ => return Err(no_reading(line)),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok((scale.0, number * scale.1)),
        _ => Err(no_reading(line)),
    }
}

fn no_reading(line: &str) -> Unavailable {
    let line: String = line.chars().take(40).collect();
    Unavailable::new(format!(
        "the external meter says {line:?}; a reading is a number of at least 0 and a unit, such \
         as \"12.5 W\" or \"1034 J\""
    ))
}

/// A value of the kind that the meter began with, without its jumps.
fn settled(
    expected: Kind,
    (kind, value): (Kind, f64),
    at: Instant,
    counter: &mut Unwrapped,
) -> Result<f64, Unavailable> {
    match (expected, kind) {
        (Kind::Energy, Kind::Energy) => counter.advance(value, at),
        (Kind::Power, Kind::Power) => Ok(value),
        _ => Err(Unavailable::new("the external meter changed between power and energy")),
    }
}

/// A file that another program writes.
struct Written {
    info: Info,
    path: PathBuf,
    counter: Unwrapped,
}

fn written(path: &Path) -> Line {
    let named = |error| Unavailable::new(format!("{}: {error}", path.display()));
    // Asked first: opening a FIFO would wait for a writer.
    if !std::fs::metadata(path).map_err(named)?.is_file() {
        let why = "is not a regular file; for a device or a pipe use cmd:cat";
        return Err(Unavailable::new(format!("{} {why}", path.display())));
    }
    let file = std::fs::File::open(path).map_err(named)?;
    let mut line = String::new();
    BufReader::new(file.take(LONGEST_LINE)).read_line(&mut line).map_err(named)?;
    parse(&line)
}

/// Tries again for some milliseconds: a program that rewrites a file in place leaves it empty for
/// a moment.
fn patiently(read: impl Fn() -> Line) -> Line {
    let mut line = read();
    for _ in 0..5 {
        if line.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
        line = read();
    }
    line
}

impl Meter for Written {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> Result<Reading, Unavailable> {
        let before = Instant::now();
        let reading = patiently(|| written(&self.path))?;
        let at = Reading::since(before, 0.0).at;
        Ok(Reading { at, value: settled(self.info.kind, reading, at, &mut self.counter)? })
    }
}

/// A command that prints.
struct Printed {
    info: Info,
    shared: Arc<Shared>,
    counter: Unwrapped,
    last: Option<Reading>,
}

/// What the thread that reads a command's lines shares with the meter.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    /// The newest line, or why there will be no more.
    latest: Option<(Instant, Line)>,
    child: Option<Running>,
    stopped: bool,
}

/// A command under way.
struct Running {
    shell: Child,
    /// What the group's watcher reads: when this is closed, by whatever ends this process, the
    /// watcher ends the group.
    _lifeline: Option<ChildStdin>,
}

/// Starts a watcher, then becomes a shell for the command ($1), whose input is empty. The watcher
/// holds none of the command's streams, so that their ends are seen.
#[cfg(unix)]
const IN_A_GROUP: &str = "exec 3<&0
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
exec sh -c \"$1\" </dev/null 3<&-";

impl Running {
    #[cfg(unix)]
    fn start(command: &str) -> std::io::Result<Self> {
        use std::os::unix::process::CommandExt;
        let mut shell = Command::new("sh")
            .args(["-c", IN_A_GROUP, "sh", command])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        // Kept apart: to wait for a child closes its input.
        let lifeline = shell.stdin.take();
        Ok(Running { shell, _lifeline: lifeline })
    }

    #[cfg(not(unix))]
    fn start(command: &str) -> std::io::Result<Self> {
        let (shell, flag) = if cfg!(windows) { ("cmd", "/C") } else { ("sh", "-c") };
        let shell = Command::new(shell)
            .args([flag, command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Running { shell, _lifeline: None })
    }

    /// Ends the command and all of its group.
    fn kill(mut self) {
        #[cfg(unix)]
        {
            use rustix::process::{Pid, Signal, kill_process_group};
            // The shell was not waited for, so its number is that of no other group.
            let _ = kill_process_group(Pid::from_child(&self.shell), Signal::KILL);
        }
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: Line) {
        self.lock().latest = Some((Instant::now(), what));
        self.news.notify_all();
    }

    /// Runs the command until the meter is dropped or the command fails.
    fn follow(&self, command: &str) {
        loop {
            let begun = Instant::now();
            match self.run(command) {
                Ok(()) => {}
                Err(why) => return self.tell(Err(why)),
            }
            let state = self.lock();
            let rest = PERIOD.saturating_sub(begun.elapsed());
            let stopped = self.news.wait_timeout_while(state, rest, |state| !state.stopped);
            if stopped.map_or_else(|e| e.into_inner().0.stopped, |(state, _)| state.stopped) {
                return;
            }
        }
    }

    fn run(&self, command: &str) -> Result<(), Unavailable> {
        let failed = |error| Unavailable::new(format!("the command {command:?}: {error}"));
        let mut state = self.lock();
        if state.stopped {
            return Ok(());
        }
        let mut child = Running::start(command).map_err(failed)?;
        let stdout = child.shell.stdout.take();
        state.child = Some(child);
        drop(state);
        let mut lines = 0;
        if let Some(stdout) = stdout {
            let mut stdout = BufReader::new(stdout);
            let mut line = String::new();
            while stdout.by_ref().take(LONGEST_LINE).read_line(&mut line).map_err(failed)? > 0 {
                if !line.trim().is_empty() {
                    self.tell(Ok(parse(&line)?));
                    lines += 1;
                }
                line.clear();
            }
        }
        // A command may go on after its output ended; until then it stays where the meter ends it.
        let status = loop {
            let mut state = self.lock();
            let Some(child) = &mut state.child else { return Ok(()) };
            if let Some(status) = child.shell.try_wait().map_err(failed)? {
                // What of its group still runs ends with the lifeline.
                state.child = None;
                break status;
            }
            drop(self.news.wait_timeout(state, Duration::from_millis(5)));
        };
        if !status.success() {
            return Err(Unavailable::new(format!("the command {command:?} failed: {status}")));
        }
        if lines == 0 {
            return Err(Unavailable::new(format!("the command {command:?} printed nothing")));
        }
        Ok(())
    }
}

impl Printed {
    fn start(name: &str, command: &str) -> Result<Self, Unavailable> {
        let shared = Arc::new(Shared::default());
        let (thread, owned) = (shared.clone(), command.to_owned());
        std::thread::Builder::new()
            .name("meter command".to_owned())
            .spawn(move || thread.follow(&owned))
            .map_err(|error| Unavailable::new(format!("cannot start a thread: {error}")))?;
        let mut meter = Printed {
            info: info(name, Kind::Power, format!("the command {command}")),
            shared,
            counter: Unwrapped::default(),
            last: None,
        };
        meter.info = info(name, meter.first()?, meter.info.source.clone());
        Ok(meter)
    }

    /// Waits for the first line.
    fn first(&self) -> Result<Kind, Unavailable> {
        let waited = self
            .shared
            .news
            .wait_timeout_while(self.shared.lock(), PATIENCE, |state| state.latest.is_none());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &state.latest {
            Some((_, Ok((kind, _)))) => Ok(*kind),
            Some((_, Err(why))) => Err(why.clone()),
            None => {
                let seconds = PATIENCE.as_secs();
                Err(Unavailable::new(format!("the command printed nothing for {seconds} s")))
            }
        }
    }
}

impl Meter for Printed {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> Result<Reading, Unavailable> {
        let latest = self.shared.lock().latest.clone();
        let (at, what) = latest.ok_or_else(|| Unavailable::new("the command printed nothing"))?;
        let reading = what?;
        if at.elapsed() > PATIENCE {
            let seconds = at.elapsed().as_secs();
            return Err(Unavailable::new(format!(
                "the external meter has been silent for {seconds} s"
            )));
        }
        if let Some(last) = self.last.filter(|last| last.at == at) {
            return Ok(last);
        }
        let value = settled(self.info.kind, reading, at, &mut self.counter)?;
        Ok(*self.last.insert(Reading { at, value }))
    }
}

impl Drop for Printed {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopped = true;
        // The thread ends when the command's output does; nobody waits for it.
        let child = state.child.take();
        drop(state);
        self.shared.news.notify_all();
        if let Some(child) = child {
            child.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_have_units() {
        assert_eq!(parse("12.5 W\n").unwrap(), (Kind::Power, 12.5));
        assert_eq!(parse("1500mW").unwrap(), (Kind::Power, 1.5));
        assert_eq!(parse(" 2e3 J ").unwrap(), (Kind::Energy, 2000.0));
        assert_eq!(parse("0.5 Wh").unwrap(), (Kind::Energy, 1800.0));
        for bad in ["", "12.5", "W", "x W", "nan W", "inf J", "-1 W", "12 V", "1 2 W"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
