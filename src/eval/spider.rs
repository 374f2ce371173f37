//! Spider (Yu et al., EMNLP 2018): questions about databases, answered in SQL, scored by execution.
//!
//! A prompt gives the schema, then the question as a comment, then `SELECT`. What a model goes on
//! with is run, read-only and for a limited time, and must find what the right query finds: the
//! same rows, in the same order if the right query asks for one.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};
use serde_json::Value as Json;

use crate::error::{Error, Result};

/// What ends a query.
pub(super) const STOP: [&str; 2] = [";", "\n\n"];
/// How queries begin, in the prompt.
const BEGINNING: &str = "SELECT";
/// The longest that a query may run.
const TIME: Duration = Duration::from_secs(5);
/// The most rows that are compared; a query that finds more is wrong.
const ROWS: usize = 100_000;

/// The right query, and where it is asked.
#[derive(Debug, Clone)]
pub struct Query {
    database: PathBuf,
    sql: String,
}

/// A value as it is compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Cell {
    Null,
    /// Whole or not, with what six digits tell apart: sums are added in any order.
    Number(String),
    Bytes(Vec<u8>),
}

impl Query {
    /// Whether what follows the beginning finds the same.
    pub(super) fn is_answered_by(&self, text: &str) -> bool {
        let sql = format!("{BEGINNING} {text}");
        let sql = STOP.iter().fold(&*sql, |sql, stop| sql.split(stop).next().unwrap_or(sql));
        match (execute(&self.database, sql), execute(&self.database, &self.sql)) {
            (Ok(found), Ok(right)) => same(found, right, self.is_ordered()),
            _ => false,
        }
    }

    fn is_ordered(&self) -> bool {
        self.sql.to_ascii_lowercase().contains("order by")
    }
}

fn same(mut found: Vec<Vec<Cell>>, mut right: Vec<Vec<Cell>>, ordered: bool) -> bool {
    if !ordered {
        found.sort();
        right.sort();
    }
    found == right
}

/// The rows that a query finds, or why there are none.
fn execute(database: &Path, sql: &str) -> Result<Vec<Vec<Cell>>, String> {
    let text = |e: rusqlite::Error| e.to_string();
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(database, flags).map_err(text)?;
    connection.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0).map_err(text)?;
    connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, 10_000_000).map_err(text)?;
    let deadline = Instant::now() + TIME;
    connection.progress_handler(1000, Some(move || Instant::now() > deadline)).map_err(text)?;
    let mut statement = connection.prepare(sql).map_err(text)?;
    if !statement.readonly() {
        return Err("it would write".to_owned());
    }
    let columns = statement.column_count();
    let mut rows = statement.query([]).map_err(text)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().map_err(text)? {
        if found.len() == ROWS {
            return Err(format!("more than {ROWS} rows"));
        }
        let cells = (0..columns).map(|i| row.get_ref(i).map(cell));
        found.push(cells.collect::<Result<Vec<_>, _>>().map_err(text)?);
    }
    Ok(found)
}

fn cell(value: ValueRef<'_>) -> Cell {
    let number = |x: f64| Cell::Number(format!("{:.5e}", x + 0.0));
    match value {
        ValueRef::Null => Cell::Null,
        // Whole numbers beyond six digits are told apart, too.
        ValueRef::Integer(x) if x.abs() >= 1_000_000 => Cell::Number(x.to_string()),
        ValueRef::Integer(x) => number(x as f64),
        ValueRef::Real(x) if x.fract() == 0.0 && (1e6..1e15).contains(&x.abs()) => {
            Cell::Number((x as i64).to_string())
        }
        ValueRef::Real(x) => number(x),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Cell::Bytes(bytes.to_vec()),
    }
}

/// (name, prompt, right query)
type Case = (String, String, Query);

/// Reads dev.json (or its like) with the tables.json and the databases beside it. Also what was
/// left out, and why.
pub(super) fn read(path: &Path) -> Result<(Vec<Case>, Vec<String>)> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let schemas = schemas(&folder.join("tables.json"))?;
    let mut cases = Vec::new();
    let (mut absent, mut failing) = (BTreeSet::new(), 0);
    let name = path.display().to_string();
    for (i, question) in array(path)?.iter().enumerate() {
        let field = |key: &str| {
            question[key].as_str().ok_or_else(|| {
                Error::format(&name, format!("question {} has no text `{key}`", i + 1))
            })
        };
        let (id, asked, sql) = (field("db_id")?, field("question")?, field("query")?);
        // A name from a file must not lead out of the folder.
        let plain =
            id.chars().all(|c| c.is_alphanumeric() || "_-. ".contains(c)) && !id.contains("..");
        let databases = folder.join("database");
        let places = [
            databases.join(id).join(format!("{id}.sqlite")),
            databases.join(format!("{id}.sqlite")),
        ];
        let (Some(schema), Some(database)) =
            (schemas.get(id), places.into_iter().find(|place| plain && place.is_file()))
        else {
            absent.insert(id.to_owned());
            continue;
        };
        let query = Query { database, sql: sql.to_owned() };
        if execute(&query.database, sql).is_err() {
            failing += 1;
            continue;
        }
        let prompt = format!("{schema}\n-- {asked}\n{BEGINNING}");
        cases.push((format!("{id} {}", i + 1), prompt, query));
    }
    let mut notes = Vec::new();
    if !absent.is_empty() {
        let names = absent.into_iter().collect::<Vec<_>>().join(", ");
        notes.push(format!("left out: questions whose schema or database is not there ({names})"));
    }
    if failing > 0 {
        notes
            .push(format!("left out: {failing} questions whose right query fails on its database"));
    }
    match cases.is_empty() {
        true => Err(Error::format(name, format!("has no question to ask; {}", notes.join("; ")))),
        false => Ok((cases, notes)),
    }
}

fn array(path: &Path) -> Result<Vec<Json>> {
    let name = path.display().to_string();
    let text = fs::read_to_string(path).map_err(|e| Error::io(&name, e))?;
    let json = serde_json::from_str(&text);
    match json.map_err(|e| Error::format(&name, format!("not JSON: {e}")))? {
        Json::Array(items) => Ok(items),
        _ => Err(Error::format(name, "is not a list; Spider's dev.json and tables.json are")),
    }
}

/// The schema of each database as CREATE TABLE statements.
fn schemas(path: &Path) -> Result<HashMap<String, String>> {
    let mut schemas = HashMap::new();
    for schema in array(path)? {
        if let Some(id) = schema["db_id"].as_str() {
            schemas.insert(id.to_owned(), create_tables(&schema));
        }
    }
    Ok(schemas)
}

fn create_tables(schema: &Json) -> String {
    let list = |key: &str| schema[key].as_array().cloned().unwrap_or_default();
    let (tables, columns) = (list("table_names_original"), list("column_names_original"));
    let types = list("column_types");
    let name =
        |i: &Json| i.as_u64().and_then(|i| columns.get(i as usize)?[1].as_str()).unwrap_or("");
    let table_of = |i: &Json| i.as_u64().and_then(|i| columns.get(i as usize)?[0].as_i64());
    let mut text = String::new();
    for (t, table) in tables.iter().enumerate() {
        let own = |i: &Json| table_of(i) == Some(t as i64);
        let mut parts: Vec<String> = Vec::new();
        for (column, kind) in columns.iter().zip(&types) {
            if column[0].as_i64() == Some(t as i64) {
                let (column, kind) = (&column[1], kind.as_str().unwrap_or(""));
                parts.push(format!("{} {kind}", column.as_str().unwrap_or("")));
            }
        }
        // Spider lists a key of several columns as a list.
        for key in list("primary_keys") {
            let key = key.as_array().cloned().unwrap_or_else(|| vec![key]);
            if key.first().is_some_and(own) {
                let names: Vec<_> = key.iter().map(name).collect();
                parts.push(format!("PRIMARY KEY ({})", names.join(", ")));
            }
        }
        for key in list("foreign_keys").iter().filter(|key| own(&key[0])) {
            let other = table_of(&key[1]).and_then(|t| tables.get(t as usize)?.as_str());
            let (from, to) = (name(&key[0]), name(&key[1]));
            parts.push(format!("FOREIGN KEY ({from}) REFERENCES {}({to})", other.unwrap_or("")));
        }
        let table = table.as_str().unwrap_or("");
        text.push_str(&format!("CREATE TABLE {table} ({});\n", parts.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(sql: &str, database: &Path) -> Result<Vec<Vec<Cell>>, String> {
        execute(database, sql)
    }

    /// A folder with one database in it.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("database/zoo");
        fs::create_dir_all(&place).unwrap();
        let connection = Connection::open(place.join("zoo.sqlite")).unwrap();
        let script = "CREATE TABLE animal (id INTEGER PRIMARY KEY, name TEXT, legs INTEGER);
             INSERT INTO animal VALUES (1, 'cat', 4), (2, 'hen', 2), (3, 'dog', 4);";
        connection.execute_batch(script).unwrap();
        let tables = r#"[{"db_id": "zoo", "table_names_original": ["animal"],
            "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [0, "legs"]],
            "column_types": ["text", "number", "text", "number"], "primary_keys": [1], "foreign_keys": []}]"#;
        fs::write(folder.path().join("tables.json"), tables).unwrap();
        let dev = r#"[
            {"db_id": "zoo", "question": "Which animals have four legs?", "query": "SELECT name FROM animal WHERE legs = 4"},
            {"db_id": "zoo", "question": "Sorted?", "query": "SELECT name FROM animal ORDER BY name DESC"},
            {"db_id": "zoo", "question": "Broken", "query": "SELECT wings FROM animal"},
            {"db_id": "sea", "question": "Gone", "query": "SELECT 1"}]"#;
        fs::write(folder.path().join("dev.json"), dev).unwrap();
        folder
    }

    #[test]
    fn answers_are_compared_by_what_they_find() {
        let folder = folder();
        let (cases, notes) = read(&folder.path().join("dev.json")).unwrap();
        assert_eq!(cases.len(), 2);
        assert!(notes[0].contains("sea") && notes[1].contains("1 questions"), "{notes:?}");
        let prompt = &cases[0].1;
        assert!(prompt.starts_with(
            "CREATE TABLE animal (id number, name text, legs number, PRIMARY KEY (id));"
        ));
        assert!(prompt.ends_with("-- Which animals have four legs?\nSELECT"), "{prompt}");
        let (four, sorted) = (&cases[0].2, &cases[1].2);
        assert!(four.is_answered_by(" name FROM animal WHERE legs > 3 ORDER BY id DESC; and more"));
        assert!(!four.is_answered_by(" name FROM animal"));
        assert!(!four.is_answered_by(" nonsense FROM"));
        assert!(sorted.is_answered_by("name from animal order by 1 desc"));
        assert!(!sorted.is_answered_by("name from animal order by 1"));
    }

    #[test]
    fn queries_neither_write_nor_run_for_ever() {
        let folder = folder();
        let zoo = folder.path().join("database/zoo/zoo.sqlite");
        for sql in ["DELETE FROM animal", "ATTACH 'other.sqlite' AS other", "DROP TABLE animal"] {
            assert!(cells(sql, &zoo).is_err(), "{sql}");
        }
        assert_eq!(
            cells("SELECT count(*), 4.0 FROM animal", &zoo).unwrap()[0][0],
            cell(ValueRef::Integer(3))
        );
        assert_eq!(cell(ValueRef::Real(4.0)), cell(ValueRef::Integer(4)));
        assert_ne!(cell(ValueRef::Integer(10_000_001)), cell(ValueRef::Integer(10_000_002)));
        let many =
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";
        assert!(cells(many, &zoo).is_err());
    }
}
