//! Tasks and where they come from: files in the layouts that people have.

use std::fs;
use std::path::Path;

use serde_json::Value as Json;

#[cfg(feature = "spider")]
use super::spider;
use crate::error::{Error, Result};

/// A prompt, perhaps with a right answer.
#[derive(Debug, Clone, Default)]
pub struct Task {
    /// What it goes by in reports.
    pub name: String,
    /// The text to go on from.
    pub prompt: String,
    /// Texts that end the generation.
    pub stop: Vec<String>,
    /// The most tokens that an answer needs.
    pub max_tokens: Option<usize>,
    /// What is right.
    pub answer: Option<Answer>,
}

/// What a continuation is compared with.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Its first line that is not empty must be this, but for space around it.
    Exact(String),
    /// With the query's beginning before it, it must find what the right query finds.
    #[cfg(feature = "spider")]
    Sql(spider::Query),
}

impl Answer {
    /// 1 for a right continuation, 0 for a wrong one, and for one that cannot be told.
    pub fn score(&self, text: &str) -> f64 {
        self.try_score(text).unwrap_or(0.0)
    }

    /// The same.
    ///
    /// # Errors
    /// A query cannot be run, whatever it is: the program that runs it cannot be started.
    pub fn try_score(&self, text: &str) -> Result<f64> {
        let right = match self {
            Answer::Exact(answer) => {
                text.trim().lines().next().unwrap_or("").trim() == answer.trim()
            }
            #[cfg(feature = "spider")]
            Answer::Sql(query) => query.is_answered_by(text)?,
        };
        Ok(f64::from(u8::from(right)))
    }
}

/// Tasks of one source.
#[derive(Debug, Clone)]
pub struct TaskSet {
    /// The layout that was found, for people.
    pub layout: &'static str,
    /// The tasks.
    pub tasks: Vec<Task>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// Beginnings of stories, for the built-in pair.
const STORIES: [&str; 10] = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom and his dog",
    "The cat sat on",
    "There was a big red ball",
    "In the forest",
    "It was raining",
    "The boy wanted to",
    "They went to the park and",
    "The old man",
];

/// Tokens of an answer beyond which nothing changes its first line.
const ANSWER_TOKENS: usize = 12;
/// The same for code and queries.
const CODE_TOKENS: usize = 256;

impl TaskSet {
    /// Beginnings of stories.
    pub fn stories() -> Self {
        let task = |prompt: &str| Task {
            name: prompt.to_owned(),
            prompt: prompt.to_owned(),
            ..Task::default()
        };
        TaskSet {
            layout: "beginnings of stories",
            tasks: STORIES.map(task).to_vec(),
            notes: Vec::new(),
        }
    }

    /// Reads a file or folder: JSON lines (Spec-Bench, MT-bench, HumanEval, or objects with
    /// `prompt` and perhaps `answer`), Spider (its folder or its dev.json), or else text with a
    /// prompt in each line.
    ///
    /// # Errors
    /// It cannot be read, or a line is none of these.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        if path.is_dir() {
            return spider_set(&path.join("dev.json"));
        }
        let bytes = fs::read(path).map_err(|e| Error::io(&name, e))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::format(&name, format!("is not UTF-8 text (at byte {at})"))
        })?;
        let is_array = text.trim_start().starts_with('[');
        if is_array && path.extension().is_some_and(|extension| extension == "json") {
            return spider_set(path);
        }
        Self::parse(&name, &text)
    }

    /// Reads JSON lines or plain lines.
    ///
    /// # Errors
    /// A line is neither.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let mut set = TaskSet { layout: "lines of text", tasks: Vec::new(), notes: Vec::new() };
        let is_json = text.trim_start().starts_with('{');
        for (i, line) in lines {
            let name = || format!("{}:{}", file_name(name), i + 1);
            if !is_json {
                let prompt = line.to_owned();
                set.tasks.push(Task { name: name(), prompt, ..Task::default() });
                continue;
            }
            let wrong = |what: String| Error::format(name(), what);
            let object: Json =
                serde_json::from_str(line).map_err(|e| wrong(format!("not JSON: {e}")))?;
            let (layout, task) = json_task(&object).map_err(wrong)?;
            (set.layout, set.tasks) = (layout, {
                let mut tasks = set.tasks;
                let given = task.name.clone();
                tasks.push(Task { name: if given.is_empty() { name() } else { given }, ..task });
                tasks
            });
        }
        if set.tasks.is_empty() {
            return Err(Error::format(name, "has no line with a prompt"));
        }
        Ok(set)
    }

    /// Keeps `limit` tasks, evenly spread: files are often sorted by kind.
    pub fn limit(&mut self, limit: usize) {
        let all = self.tasks.len();
        if limit < all {
            let tasks = std::mem::take(&mut self.tasks);
            let wanted: Vec<usize> = (0..limit).map(|i| i * all / limit).collect();
            let kept = tasks.into_iter().enumerate().filter(|(i, _)| wanted.contains(i));
            self.tasks = kept.map(|(_, task)| task).collect();
        }
    }

    /// Puts each prompt where `{prompt}` stands in a template, for models that want a frame.
    ///
    /// # Errors
    /// It stands nowhere.
    pub fn frame(&mut self, template: &str) -> Result<()> {
        if !template.contains("{prompt}") {
            return Err(Error::invalid("a frame needs {prompt} where the prompt goes"));
        }
        for task in &mut self.tasks {
            task.prompt = template.replace("{prompt}", &task.prompt);
        }
        Ok(())
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

/// The task of one JSON object, and the layout that it shows.
fn json_task(object: &Json) -> Result<(&'static str, Task), String> {
    let text = |key: &str| object[key].as_str().map(str::to_owned);
    let id = |key: &str| match &object[key] {
        Json::String(id) => id.clone(),
        Json::Number(id) => id.to_string(),
        _ => String::new(),
    };
    if let Some(turns) = object["turns"].as_array() {
        let prompt = turns.first().and_then(Json::as_str);
        let prompt = prompt.ok_or("`turns` does not begin with a text")?.to_owned();
        let name = [id("category"), id("question_id")].join(" ").trim().to_owned();
        return Ok((
            "Spec-Bench or MT-bench, first turns",
            Task { name, prompt, ..Task::default() },
        ));
    }
    let prompt = text("prompt").ok_or_else(|| {
        let keys: Vec<_> = object.as_object().into_iter().flatten().map(|(key, _)| key).collect();
        format!("neither `prompt` (a text) nor `turns` is among its keys {keys:?}")
    })?;
    if object.get("entry_point").is_some() {
        // Where a completed function ends.
        let stop = ["\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint("].map(str::to_owned);
        let task = Task {
            name: id("task_id"),
            prompt,
            stop: stop.to_vec(),
            max_tokens: Some(CODE_TOKENS),
            answer: None,
        };
        return Ok(("HumanEval (completions are not run)", task));
    }
    let answer = match &object["answer"] {
        Json::Null => None,
        Json::String(answer) => Some(answer.clone()),
        Json::Number(answer) => Some(answer.to_string()),
        other => return Err(format!("`answer` is {other}; a text or a number is needed")),
    };
    let max_tokens = answer.as_ref().map(|answer| ANSWER_TOKENS + answer.len());
    let layout = if answer.is_some() { "questions with answers" } else { "prompts" };
    let answer = answer.map(Answer::Exact);
    Ok((layout, Task { name: id("id"), prompt, stop: Vec::new(), max_tokens, answer }))
}

#[cfg(feature = "spider")]
fn spider_set(path: &Path) -> Result<TaskSet> {
    let (cases, notes) = spider::read(path)?;
    let task = |(name, prompt, query)| Task {
        name,
        prompt,
        stop: spider::STOP.map(str::to_owned).to_vec(),
        max_tokens: Some(CODE_TOKENS),
        answer: Some(Answer::Sql(query)),
    };
    let tasks = cases.into_iter().map(task).collect();
    Ok(TaskSet { layout: "Spider, execution accuracy", tasks, notes })
}

#[cfg(not(feature = "spider"))]
fn spider_set(path: &Path) -> Result<TaskSet> {
    Err(Error::unsupported(
        path.display().to_string(),
        "Spider's queries are run by SQLite, which this program was built without (feature `spider`)",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_told_apart() {
        let set = |text: &str| TaskSet::parse("dir/f.jsonl", text);
        let plain = set("First.\n\n  Second.\n").unwrap();
        assert_eq!(plain.layout, "lines of text");
        assert_eq!(plain.tasks[1].prompt, "  Second.");
        assert_eq!(plain.tasks[1].name, "f.jsonl:3");
        let bench =
            set(r#"{"question_id": 81, "category": "qa", "turns": ["Why?", "And?"]}"#).unwrap();
        assert_eq!((&*bench.tasks[0].name, &*bench.tasks[0].prompt), ("qa 81", "Why?"));
        let code =
            set(r#"{"task_id": "H/0", "prompt": "def f():\n", "entry_point": "f", "test": ""}"#);
        let code = code.unwrap();
        assert_eq!(code.tasks[0].prompt, "def f():\n");
        assert!(code.tasks[0].stop.contains(&"\ndef ".to_owned()));
        let asked = set("{\"prompt\": \"2 and 2?\", \"answer\": 4}\n{\"prompt\": \"Go\"}").unwrap();
        let answer = asked.tasks[0].answer.as_ref().unwrap();
        assert_eq!(
            [" 4\nSo", "\n4", "4.", "", "44"].map(|text| answer.score(text)),
            [1.0, 1.0, 0.0, 0.0, 0.0]
        );
        assert!(asked.tasks[1].answer.is_none());
        for (text, what) in [
            ("{\"turns\": []}", "f.jsonl:1: `turns`"),
            ("{\"prompt\": \"x\"}\n{", "f.jsonl:2: not JSON"),
            ("{\"question\": \"x\"}", "question"),
            ("{\"prompt\": \"x\", \"answer\": []}", "`answer`"),
            (" \n", "no line"),
        ] {
            let message = set(text).unwrap_err().to_string();
            assert!(message.contains(what), "{message}");
        }
    }

    #[test]
    fn a_limit_takes_from_all_over() {
        let mut set = TaskSet::stories();
        set.limit(3);
        let prompts: Vec<_> = set.tasks.iter().map(|task| task.prompt.as_str()).collect();
        assert_eq!(prompts, [STORIES[0], STORIES[3], STORIES[6]]);
        set.limit(99);
        assert_eq!(set.tasks.len(), 3);
        set.frame("USER: {prompt} ASSISTANT:").unwrap();
        assert_eq!(set.tasks[0].prompt, "USER: Once upon a time ASSISTANT:");
        assert!(set.frame("no place").is_err());
    }
}
