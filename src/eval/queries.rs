//! Queries that a model wrote, run where they can do no harm: in a process of their own, which may
//! select and nothing else, has little memory and is ended when a query takes too long.
//!
//! SQLite asks its progress handler between steps, and one step may take minutes. So the limits of
//! [`execute`] (what is allowed, how large values are, how much memory there is) make a query fail
//! early, and the process ([`Helper`]) makes sure that it ends. The program `mtad` is that process:
//! it reads requests, one line of JSON each, and answers each with a line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value as Json, json};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};

/// The longest that a query may run.
const TIME: Duration = Duration::from_secs(5);
/// How much later the process is ended that did not end the query itself.
const GRACE: Duration = Duration::from_millis(500);
/// The most rows that are compared; a query that finds more is wrong.
const ROWS: usize = 100_000;
/// The most bytes that they may have.
const RESULT: usize = 32 << 20;
/// The most bytes of a value.
const LENGTH: i32 = 1_000_000;
/// What SQLite may have of memory.
const HEAP: i64 = 64 << 20;
/// What the process may have of address space: its program, its threads, SQLite, the result.
#[cfg(unix)]
const ADDRESS_SPACE: u64 = 1 << 30;
/// The command of `mtad` that answers requests.
pub(crate) const COMMAND: &str = "answer-queries";

/// What a query found, to be compared: hashes of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rows {
    /// In their order.
    ordered: u128,
    /// Whatever their order.
    sorted: u128,
}

impl Rows {
    /// Whether both are the same rows, in the same order if that counts.
    pub fn same(&self, other: &Rows, ordered: bool) -> bool {
        self.sorted == other.sorted && (!ordered || self.ordered == other.ordered)
    }

    fn of(mut rows: Vec<Vec<u8>>) -> Self {
        let hash = |rows: &[Vec<u8>]| xxh3_128(&rows.concat());
        let ordered = hash(&rows);
        rows.sort_unstable();
        Rows { ordered, sorted: hash(&rows) }
    }
}

/// The rows that a query finds in a database, or why there are none.
fn execute(database: &Path, sql: &str) -> Result<Rows, String> {
    let text = |e: rusqlite::Error| e.to_string();
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(database, flags).map_err(text)?;
    // The heap's limit is the process's. What does not fit there is not written to a disk instead.
    for (name, value) in [("hard_heap_limit", HEAP), ("temp_store", 2), ("cell_size_check", 1)] {
        connection.pragma_update(None, name, value).map_err(text)?;
    }
    for (limit, most) in [
        (Limit::SQLITE_LIMIT_LENGTH, LENGTH),
        (Limit::SQLITE_LIMIT_SQL_LENGTH, 100_000),
        (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000),
        (Limit::SQLITE_LIMIT_ATTACHED, 0),
        (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
    ] {
        connection.set_limit(limit, most).map_err(text)?;
    }
    for (config, on) in [
        (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
        (DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false),
    ] {
        connection.set_db_config(config, on).map_err(text)?;
    }
    let deadline = Instant::now() + TIME;
    connection.progress_handler(1000, Some(move || Instant::now() > deadline)).map_err(text)?;
    connection.authorizer(Some(|asked: AuthContext<'_>| allow(&asked.action))).map_err(text)?;
    let mut statement = connection.prepare(sql).map_err(text)?;
    let columns = statement.column_count();
    let mut rows = statement.query([]).map_err(text)?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next().map_err(text)? {
        let mut cells = Vec::new();
        for i in 0..columns {
            put_cell(row.get_ref(i).map_err(text)?, &mut cells);
        }
        bytes += cells.len();
        if found.len() == ROWS || bytes > RESULT {
            return Err(format!("more than {ROWS} rows or {RESULT} bytes"));
        }
        found.push(cells);
    }
    Ok(Rows::of(found))
}

/// What a query may do: select, read columns, call functions, recur.
fn allow(action: &AuthAction<'_>) -> Authorization {
    match action {
        AuthAction::Select
        | AuthAction::Read { .. }
        | AuthAction::Function { .. }
        | AuthAction::Recursive => Authorization::Allow,
        _ => Authorization::Deny,
    }
}

/// Appends a value in a form in which equal values are equal bytes, and no value is the beginning
/// of another. Numbers, whole or not, count with what six digits tell apart: sums are added in any
/// order.
fn put_cell(value: ValueRef<'_>, out: &mut Vec<u8>) {
    let short = |x: f64| format!("{:.5e}", x + 0.0);
    let number = match value {
        ValueRef::Null => return out.push(b'n'),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
            out.push(b'b');
            out.extend((bytes.len() as u64).to_le_bytes());
            return out.extend(bytes);
        }
        // Whole numbers beyond six digits are told apart, too.
        ValueRef::Integer(x) if x.unsigned_abs() >= 1_000_000 => x.to_string(),
        ValueRef::Integer(x) => short(x as f64),
        ValueRef::Real(x) if x.fract() == 0.0 && (1e6..1e15).contains(&x.abs()) => {
            (x as i64).to_string()
        }
        ValueRef::Real(x) => short(x),
    };
    out.push(b'0');
    out.extend(number.as_bytes());
    out.push(b' ');
}

/// Answers requests until there are no more: what the program `mtad` does as the process of
/// [`run`].
///
/// # Errors
/// The limits of the process cannot be set; an answer cannot be written.
pub(crate) fn answer_queries() -> Result<()> {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, setrlimit};
        for (resource, most) in [(Resource::As, ADDRESS_SPACE), (Resource::Core, 0)] {
            let limit = Rlimit { current: Some(most), maximum: Some(most) };
            let failed = |e: rustix::io::Errno| Error::io("the limits of a process", e.into());
            setrlimit(resource, limit).map_err(failed)?;
        }
    }
    let (requests, inbox) = mpsc::channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(io::Result::ok) {
            if requests.send(line).is_err() {
                return;
            }
        }
        // Who asked has gone, and a query may still be under way.
        std::process::exit(0);
    });
    for line in inbox {
        let answer = match serde_json::from_str::<Json>(&line) {
            Ok(request) => {
                let text = |key: &str| request[key].as_str().unwrap_or_default();
                execute(Path::new(text("database")), text("sql"))
            }
            Err(error) => Err(error.to_string()),
        };
        let answer = match answer {
            Ok(Rows { ordered, sorted }) => {
                json!({"ordered": format!("{ordered:x}"), "sorted": format!("{sorted:x}")})
            }
            Err(why) => json!({"failed": why}),
        };
        let mut out = io::stdout().lock();
        let written = writeln!(out, "{answer}").and_then(|()| out.flush());
        written.map_err(|e| Error::io("standard output", e))?;
    }
    Ok(())
}

/// Where the program is that [`run`] starts.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Says where the program `mtad` is, which runs the queries of Spider in a process of its own. If
/// nobody says so, it is looked for beside the running program and in the folder above that.
/// Only the first call counts.
pub fn run_queries_with(program: impl Into<PathBuf>) {
    // Later calls change nothing, as documented.
    let _ = PROGRAM.set(program.into());
}

fn program() -> Result<PathBuf> {
    if let Some(program) = PROGRAM.get() {
        return Ok(program.clone());
    }
    let name = format!("mtad{}", std::env::consts::EXE_SUFFIX);
    let running = std::env::current_exe().map_err(|e| Error::io("the running program", e))?;
    let beside = running.ancestors().skip(1).take(2).map(|folder| folder.join(&name));
    beside.into_iter().find(|place| place.is_file()).ok_or_else(|| {
        let what = format!(
            "queries run in a process of their own, for which the program {name} is needed; it is \
             not beside {}",
            running.display()
        );
        Error::unsupported("Spider", what)
    })
}

/// A process that answers requests.
struct Helper {
    process: Child,
    requests: ChildStdin,
    answers: Receiver<String>,
}

/// The process that is used until it has to be ended.
static HELPER: Mutex<Option<Helper>> = Mutex::new(None);

impl Helper {
    fn start() -> Result<Self> {
        let program = program()?;
        let name = program.display().to_string();
        let mut command = Command::new(&program);
        command.arg(COMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        #[cfg(unix)]
        {
            use std::os::unix::process::CommandExt;
            // Ctrl-C is for this program, which then decides what becomes of the query.
            command.env_clear().process_group(0);
        }
        let failed = |e| Error::io(&name, e);
        let mut process = command.spawn().map_err(failed)?;
        let (Some(requests), Some(out)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            let mut out = BufReader::new(out);
            let mut line = String::new();
            // An answer is two hashes or a message; a line that is none of that ends it.
            while matches!(out.by_ref().take(1 << 16).read_line(&mut line), Ok(1..)) {
                if sender.send(std::mem::take(&mut line)).is_err() {
                    return;
                }
            }
        });
        Ok(Helper { process, requests, answers })
    }

    /// The answer, or why there is none; the process is of no use then.
    fn ask(&mut self, request: &Json) -> Result<Json, String> {
        let sent = writeln!(self.requests, "{request}").and_then(|()| self.requests.flush());
        sent.map_err(|e| format!("the process ended: {e}"))?;
        match self.answers.recv_timeout(TIME + GRACE) {
            Ok(line) => serde_json::from_str(&line).map_err(|e| format!("no answer: {e}")),
            Err(RecvTimeoutError::Timeout) => Err(format!("took longer than {TIME:?}")),
            Err(RecvTimeoutError::Disconnected) => Err("the process ended".to_owned()),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The rows that a query finds in a database, or why there are none.
///
/// # Errors
/// No process can be started that would run it.
pub(super) fn run(database: &Path, sql: &str) -> Result<Result<Rows, String>> {
    let mut helper = HELPER.lock().unwrap_or_else(PoisonError::into_inner);
    let running = match &mut *helper {
        Some(running) => running,
        None => helper.insert(Helper::start()?),
    };
    let request = json!({"database": database.to_string_lossy(), "sql": sql});
    let answer = match running.ask(&request) {
        Ok(answer) => answer,
        Err(why) => {
            *helper = None;
            return Ok(Err(why));
        }
    };
    let hash = |key: &str| u128::from_str_radix(answer[key].as_str()?, 16).ok();
    Ok(match (hash("ordered"), hash("sorted")) {
        (Some(ordered), Some(sorted)) => Ok(Rows { ordered, sorted }),
        _ => Err(answer["failed"].as_str().unwrap_or("no answer").to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database of three animals.
    fn zoo(folder: &Path) -> PathBuf {
        let path = folder.join("zoo.sqlite");
        let script = "CREATE TABLE animal (id INTEGER PRIMARY KEY, name TEXT, legs INTEGER);
             INSERT INTO animal VALUES (1, 'cat', 4), (2, 'hen', 2), (3, 'dog', 4);";
        Connection::open(&path).unwrap().execute_batch(script).unwrap();
        path
    }

    fn bytes(value: ValueRef<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        put_cell(value, &mut out);
        out
    }

    #[test]
    fn a_query_may_select_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let zoo = zoo(folder.path());
        for sql in [
            "DELETE FROM animal",
            "ATTACH 'other.sqlite' AS other",
            "DROP TABLE animal",
            "PRAGMA journal_mode = wal",
            "PRAGMA user_version",
            "SELECT * FROM pragma_database_list",
            "VACUUM INTO 'copy.sqlite'",
            "CREATE TEMP TABLE t (x)",
            "BEGIN",
            "EXPLAIN DELETE FROM animal",
        ] {
            assert!(execute(&zoo, sql).is_err(), "{sql}");
        }
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        let all = execute(&zoo, "SELECT name FROM animal ORDER BY id").unwrap();
        let other = execute(&zoo, "SELECT name FROM animal ORDER BY name").unwrap();
        assert!(all.same(&other, false) && !all.same(&other, true));
        let recursive = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 3)
                         SELECT i FROM n";
        let counted = execute(&zoo, recursive).unwrap();
        assert!(counted.same(&execute(&zoo, "SELECT id FROM animal").unwrap(), true));
    }

    #[test]
    fn results_and_values_have_limits() {
        let folder = tempfile::tempdir().unwrap();
        let zoo = zoo(folder.path());
        let many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT ";
        for (sql, why) in [
            (format!("{many} i FROM n"), "rows"),
            (format!("{many} zeroblob(900000) FROM n"), "bytes"),
            ("SELECT zeroblob(2000000)".to_owned(), "too big"),
            // Sorting would need gigabytes.
            (format!("{many} zeroblob(900000) FROM n ORDER BY 1"), "out of memory"),
        ] {
            let found = execute(&zoo, &sql).unwrap_err();
            assert!(found.contains(why), "{sql}: {found}");
        }
    }

    #[test]
    fn values_are_compared_by_what_they_are() {
        assert_eq!(bytes(ValueRef::Real(4.0)), bytes(ValueRef::Integer(4)));
        assert_eq!(bytes(ValueRef::Real(0.1 + 0.2)), bytes(ValueRef::Real(0.3)));
        assert_ne!(bytes(ValueRef::Integer(10_000_001)), bytes(ValueRef::Integer(10_000_002)));
        assert_ne!(bytes(ValueRef::Integer(i64::MIN)), bytes(ValueRef::Integer(i64::MIN + 1)));
        assert_ne!(bytes(ValueRef::Text(b"4")), bytes(ValueRef::Integer(4)));
        assert_ne!(bytes(ValueRef::Null), bytes(ValueRef::Text(b"")));
    }
}
