//! The small files beside a vocabulary: special tokens, their roles, chat templates.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::Value;

use super::super::json::{self, Object, shown};
use super::{Added, Kind, Model, Roles, Token};
use crate::error::{Error, Result};
use crate::gguf::OwnedValue;

/// What those files say.
pub(super) struct Special<'a> {
    /// `tokenizer_config.json`.
    config: Option<Object>,
    /// `special_tokens_map.json`.
    map: Option<Object>,
    model: &'a Model<'a>,
    /// Tokens that they list.
    pub added: Vec<Added>,
}

/// Ids with a role, and further ends of a text.
pub(super) struct AllRoles {
    pub ids: Roles,
    pub eot: Option<u32>,
    pub eom: Option<u32>,
}

impl<'a> Special<'a> {
    pub fn read(folder: &Path, config: Option<Object>, model: &'a Model<'a>) -> Result<Self> {
        let map = Object::read(&folder.join("special_tokens_map.json"))?;
        let listed = Object::read(&folder.join("added_tokens.json"))?;
        let mut special = Special { config, map, model, added: Vec::new() };
        let names = special.names();
        let mut added = Vec::new();
        if let Some(listed) = &listed {
            for (text, id) in listed.iter() {
                let id = id.as_u64().ok_or_else(|| listed.wrong(text, "a whole number >= 0"))?;
                added.push(Added::new(id, text, names.contains(text)));
            }
        }
        if let Some(config) = &special.config
            && let Some(decoder) = config.object("added_tokens_decoder")?
        {
            for (id, token) in decoder.iter() {
                let (Ok(number), Some(text)) = (id.parse(), token["content"].as_str()) else {
                    return Err(decoder.wrong(id, "an id with the token's content"));
                };
                let is_special = token["special"].as_bool().unwrap_or(false);
                added.push(Added::new(number, text, is_special || names.contains(text)));
            }
        }
        special.added = added;
        Ok(special)
    }

    fn files(&self) -> impl Iterator<Item = &Object> {
        [&self.config, &self.map].into_iter().flatten()
    }

    /// The texts of tokens that steer the model, but for the unknown one.
    fn names(&self) -> HashSet<String> {
        let roles = ["bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        let mut names: HashSet<String> = self
            .files()
            .flat_map(|file| roles.iter().filter_map(|role| file.get(role)))
            .chain(self.files().flat_map(|file| {
                ["additional_special_tokens", "extra_special_tokens"]
                    .iter()
                    .filter_map(|key| file.get(key)?.as_array())
                    .flatten()
            }))
            .filter_map(text_of)
            .map(str::to_owned)
            .collect();
        if self.model.architecture == "opt" {
            // The first of its vocabulary, which no text was made of.
            names.extend(["<s>", "<pad>", "</s>", "<unk>"].map(str::to_owned));
        }
        names
    }

    /// Makes tokens that steer the model control tokens.
    pub fn name_controls(&self, tokens: &mut [Token]) {
        let names = self.names();
        for token in tokens {
            if matches!(token.kind, Kind::Normal | Kind::UserDefined) && names.contains(&token.text)
            {
                token.kind = Kind::Control;
            }
        }
    }

    /// The ids with a role: by name, or else by the model's own config, or else as the vocabulary
    /// itself says.
    pub fn roles(&self, tokens: &[Token], own: Roles, notes: &mut Vec<String>) -> AllRoles {
        let mut ids: HashMap<&str, u32> = HashMap::with_capacity(tokens.len());
        for (id, token) in (0..).zip(tokens) {
            ids.entry(&token.text).or_insert(id);
        }
        let configs = || [self.model.generation, Some(self.model.config)].into_iter().flatten();
        // A number, or a list of them. Less than 0 means none.
        let stated = |config: &Object, key: &str, notes: &mut Vec<String>| -> Vec<u32> {
            let values = match config.get(key) {
                Some(Value::Array(values)) => values.as_slice(),
                Some(value) => std::slice::from_ref(value),
                None => &[],
            };
            let mut found = Vec::new();
            for value in values {
                match value.as_u64().filter(|&id| id < tokens.len() as u64) {
                    Some(id) => found.push(id as u32),
                    None if value.as_i64().is_some_and(|id| id < 0) => {}
                    None => notes.push(format!(
                        "{}: `{key}` is {}, which is no token, and is left out",
                        config.file(),
                        shown(value)
                    )),
                }
            }
            found
        };
        let mut role = |name: &str, own: Option<u32>| {
            for file in self.files() {
                let Some(text) = file.get(&format!("{name}_token")).and_then(text_of) else {
                    continue;
                };
                match ids.get(text) {
                    Some(&id) => return Some(id),
                    None => notes.push(format!(
                        "{}: `{name}_token` is {text:?}, which is no token, and is left out",
                        file.file()
                    )),
                }
            }
            let key = format!("{name}_token_id");
            configs().find_map(|config| stated(config, &key, notes).first().copied()).or(own)
        };
        let opt_unk = match self.model.architecture {
            "opt" => ids.get("<unk>").copied(),
            _ => None,
        };
        let roles = Roles {
            bos: role("bos", own.bos),
            eos: role("eos", own.eos),
            unk: role("unk", own.unk.or(opt_unk)),
            pad: role("pad", own.pad),
        };

        // Chat models end a turn in other ways, too; GGUF has two more places for them.
        let ends = configs().find_map(|config| {
            config.get("eos_token_id").map(|_| stated(config, "eos_token_id", &mut Vec::new()))
        });
        let mut ends: Vec<u32> =
            ends.unwrap_or_default().into_iter().filter(|&id| Some(id) != roles.eos).collect();
        let mut place = |name: &str| {
            let at = ends.iter().position(|&id| tokens[id as usize].text == name)?;
            Some(ends.remove(at))
        };
        let (mut eot, mut eom) = (place("<|eot_id|>"), place("<|eom_id|>"));
        let mut rest = ends.into_iter();
        eot = eot.or_else(|| rest.next());
        eom = eom.or_else(|| rest.next());
        for id in rest {
            notes.push(format!(
                "token {id}, {:?}, ends texts too, which GGUF has no place for",
                tokens[id as usize].text
            ));
        }
        AllRoles { ids: roles, eot, eom }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.config.as_ref().map_or(Ok(None), |config| config.bool(key))
    }

    /// Whether texts begin with the token for it.
    pub fn add_bos(&self) -> Result<Option<bool>> {
        self.flag("add_bos_token")
    }

    /// Whether texts end with the token for it.
    pub fn add_eos(&self) -> Result<Option<bool>> {
        self.flag("add_eos_token")
    }

    /// Whether texts begin with a space of the tokenizer's own.
    pub fn space_prefix(&self) -> Result<Option<bool>> {
        self.flag("add_prefix_space")
    }

    /// Chat templates, by GGUF's keys: from files of their own, or else `tokenizer_config.json`.
    pub fn chat_templates(&self, folder: &Path) -> Result<Vec<(String, OwnedValue)>> {
        const KEY: &str = "chat_template";
        let path = folder.join("chat_template.jinja");
        if let Some(bytes) = json::read(&path)? {
            let text = String::from_utf8(bytes)
                .map_err(|_| Error::format(path.display().to_string(), "is not UTF-8 text"))?;
            return Ok(vec![(KEY.to_owned(), text.into())]);
        }
        let own = Object::read(&folder.join("chat_template.json"))?;
        let Some(file) = own.as_ref().or(self.config.as_ref()) else { return Ok(Vec::new()) };
        let mut templates = Vec::new();
        let mut names = Vec::new();
        match file.get(KEY) {
            None => {}
            Some(Value::String(text)) => templates.push((KEY.to_owned(), text.clone().into())),
            Some(Value::Array(list)) => {
                for entry in list {
                    let (name, text) = (entry["name"].as_str(), entry["template"].as_str());
                    let (Some(name), Some(text)) = (name, text) else {
                        return Err(file.wrong(KEY, "a list of names with templates"));
                    };
                    let key = match name {
                        "default" => KEY.to_owned(),
                        _ => format!("{KEY}.{name}"),
                    };
                    if name != "default" {
                        names.push(name.to_owned());
                    }
                    templates.push((key, OwnedValue::from(text)));
                }
            }
            Some(_) => return Err(file.wrong(KEY, "a template")),
        }
        if !names.is_empty() {
            templates.push(("chat_templates".to_owned(), OwnedValue::Strings(names)));
        }
        Ok(templates)
    }
}

/// The text of a token that a file names, as a string or an object with its content.
fn text_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}
