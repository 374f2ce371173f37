//! Spider (Yu et al., EMNLP 2018): questions about databases, answered in SQL, scored by execution.
//!
//! A prompt gives the schema, then the question as a comment, then `SELECT`. What a model goes on
//! with is run where it can do no harm ([`super::queries`]), and must find what the right query
//! finds: the same rows, in the same order if the right query asks for one.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::queries::{Rows, run};
use crate::error::{Error, Result};

/// What ends a query.
pub(super) const STOP: [&str; 2] = [";", "\n\n"];
/// How queries begin, in the prompt.
const BEGINNING: &str = "SELECT";

/// The right query, where it is asked, and what it finds.
#[derive(Debug, Clone)]
pub struct Query {
    database: PathBuf,
    sql: String,
    right: Rows,
}

impl Query {
    /// Whether what follows the beginning finds the same.
    ///
    /// # Errors
    /// It cannot be run, whatever it is.
    pub(super) fn is_answered_by(&self, text: &str) -> Result<bool> {
        let sql = format!("{BEGINNING} {text}");
        let sql = STOP.iter().fold(&*sql, |sql, stop| sql.split(stop).next().unwrap_or(sql));
        let found = run(&self.database, sql)?;
        Ok(found.is_ok_and(|found| found.same(&self.right, self.is_ordered())))
    }

    fn is_ordered(&self) -> bool {
        self.sql.to_ascii_lowercase().contains("order by")
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
        let Ok(right) = run(&database, sql)? else {
            failing += 1;
            continue;
        };
        let query = Query { database, sql: sql.to_owned(), right };
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
    // Asked first: opening a FIFO would wait for a writer.
    if !fs::metadata(path).map_err(|e| Error::io(&name, e))?.is_file() {
        return Err(Error::format(name, "is not a regular file"));
    }
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
