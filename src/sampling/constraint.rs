//! Texts that are held to a language: which tokens may follow.
//!
//! A [`Constraint`] is the language, a [`Matcher`] a place in one of its texts, and a [`Guide`] leads one
//! generation: asked for what may follow a path, it moves a single matcher from path to path, back to
//! what they share and on from there, so that the rows of a tree cost a few steps each and no text is
//! read twice. Tokens that may not follow have probability 0 before anything else is done to a row
//! ([`super::Distribution::fill`]), for target and draft alike.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::Path;
use crate::error::{Error, Result};
use crate::lm::Token;

/// A language that texts are held to.
pub trait Constraint: fmt::Debug + Send + Sync {
    /// A place at the start of a text.
    ///
    /// # Errors
    /// [`Error::Grammar`] if none can be made.
    fn matcher(&self) -> Result<Box<dyn Matcher>>;

    /// Whether a token ends a text. Matchers are never given one.
    fn is_end(&self, token: Token) -> bool;
}

/// Constraints are the same if they are one object.
impl PartialEq for dyn Constraint {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::addr_eq(self, other)
    }
}

/// A place in a text of a language. After an error it is not used again.
pub trait Matcher: Send {
    /// Moves on by a token.
    ///
    /// # Errors
    /// [`Error::Grammar`] if the token may not follow.
    fn advance(&mut self, token: Token) -> Result<()>;

    /// Moves back by so many tokens.
    ///
    /// # Errors
    /// [`Error::Grammar`] if that cannot be done.
    fn retreat(&mut self, tokens: usize) -> Result<()>;

    /// Allows the tokens that may follow, in a mask that allows none: those that end a text where it
    /// may end, and one of them where nothing else may follow.
    ///
    /// # Errors
    /// [`Error::Grammar`] if it cannot be told, or no token may follow and the text may not end.
    fn allow(&mut self, mask: &mut Mask) -> Result<()>;
}

/// A set of tokens: a bit for each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mask {
    words: Vec<u32>,
}

impl Mask {
    /// Allows a token.
    pub fn allow(&mut self, token: Token) {
        let word = token as usize / 32;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (token % 32);
    }

    /// Takes a token out.
    pub fn forbid(&mut self, token: Token) {
        if let Some(word) = self.words.get_mut(token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }

    /// Allows the tokens of these words, the lowest bit first, and no others.
    pub fn assign(&mut self, words: &[u32]) {
        self.words.clear();
        self.words.extend_from_slice(words);
    }

    /// Whether a token is allowed.
    pub fn allows(&self, token: Token) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// The allowed tokens, in their order.
    pub fn tokens(&self) -> impl Iterator<Item = Token> {
        (0..).zip(&self.words).flat_map(|(i, &word)| {
            let next = |&left: &u32| Some(left & left.wrapping_sub(1)).filter(|&left| left != 0);
            std::iter::successors(Some(word).filter(|&word| word != 0), next)
                .map(move |left| 32 * i + left.trailing_zeros())
        })
    }

    /// The token that is allowed, if it is the only one.
    pub fn only(&self) -> Option<Token> {
        let mut tokens = self.tokens();
        tokens.next().filter(|_| tokens.next().is_none())
    }

    /// Makes `into` the logits with negative infinity for each token that is not allowed. Returns
    /// whether any is.
    pub(super) fn apply(&self, logits: &[f32], into: &mut Vec<f32>) -> bool {
        into.clear();
        into.resize(logits.len(), f32::NEG_INFINITY);
        let mut any = false;
        for ((&word, from), into) in
            self.words.iter().zip(logits.chunks(32)).zip(into.chunks_mut(32))
        {
            let mut left = match from.len() {
                32 => word,
                len => word & ((1 << len) - 1),
            };
            any |= left != 0;
            if left == u32::MAX {
                into.copy_from_slice(from);
                continue;
            }
            while left != 0 {
                let i = left.trailing_zeros() as usize;
                into[i] = from[i];
                left &= left - 1;
            }
        }
        any
    }
}

/// Holds one generation to a language.
pub struct Guide {
    constraint: Arc<dyn Constraint>,
    start: usize,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// None before the start and after an error.
    matcher: Option<Box<dyn Matcher>>,
    /// The generated tokens that the matcher has seen.
    seen: Vec<Token>,
    /// The generated tokens of the text that `masks` are of.
    text: Vec<Token>,
    /// The first of them that ends a text.
    ended: Option<Token>,
    /// What may follow each branch that was asked for.
    masks: HashMap<Vec<Token>, Arc<Mask>>,
    /// Why a mask allows nothing.
    complaint: Option<String>,
}

impl Guide {
    /// Holds texts to `constraint` from their token `start` on.
    pub fn new(constraint: Arc<dyn Constraint>, start: usize) -> Self {
        Guide { constraint, start, state: RefCell::default() }
    }

    /// The language.
    pub fn constraint(&self) -> &Arc<dyn Constraint> {
        &self.constraint
    }

    /// Where in the text it begins.
    pub fn start(&self) -> usize {
        self.start
    }

    /// What may follow a path: nothing where that cannot be told, of which [`Guide::refusal`] then
    /// speaks. After the end of a text comes only that end again.
    pub fn mask(&self, path: Path<'_>) -> Arc<Mask> {
        let state = &mut *self.state.borrow_mut();
        let text = &path.text[self.start.min(path.text.len())..];
        let is_end = |&token: &Token| self.constraint.is_end(token);
        if state.text != text {
            // Texts grow: what was looked through is not looked through again.
            let known = match text.starts_with(&state.text) {
                true => state.text.len(),
                false => 0,
            };
            let before = state.ended.filter(|_| known > 0);
            state.ended = before.or_else(|| text[known..].iter().copied().find(|t| is_end(t)));
            state.masks.clear();
            state.text.clear();
            state.text.extend_from_slice(text);
        }
        if let Some(mask) = state.masks.get(path.branch) {
            return mask.clone();
        }
        let mut mask = Mask::default();
        match state.ended.or_else(|| path.branch.iter().copied().find(|t| is_end(t))) {
            Some(end) => mask.allow(end),
            None => {
                let text = std::mem::take(&mut state.text);
                let found = state
                    .at(&*self.constraint, &text, path.branch)
                    .and_then(|matcher| matcher.allow(&mut mask));
                state.text = text;
                if let Err(error) = found {
                    mask = Mask::default();
                    state.matcher = None;
                    state.complaint = Some(error.to_string());
                }
            }
        }
        let mask = Arc::new(mask);
        state.masks.insert(path.branch.to_vec(), mask.clone());
        mask
    }

    /// The token that comes next because no other may, unless the text has ended.
    pub fn forced(&self, text: &[Token]) -> Option<Token> {
        let mask = self.mask(Path { text, branch: &[], guide: Some(self) });
        mask.only().filter(|_| self.state.borrow().ended.is_none())
    }

    /// Whether the text is, as far as it goes, one of the language.
    pub fn follows(&self, text: &[Token]) -> bool {
        let generated = text.get(self.start..).unwrap_or_default();
        let end = generated.iter().position(|&token| self.constraint.is_end(token));
        let before_end = &generated[..end.unwrap_or(generated.len())];
        self.state.borrow_mut().at(&*self.constraint, before_end, &[]).is_ok()
    }

    /// The error of a row that nothing may follow.
    pub fn refusal(&self) -> Error {
        let complaint = self.state.borrow().complaint.clone();
        Error::Grammar(complaint.unwrap_or_else(|| {
            "no token of the model may follow here by the grammar, and the text may not end"
                .to_owned()
        }))
    }
}

impl fmt::Debug for Guide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guide")
            .field("constraint", &self.constraint)
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

impl State {
    /// The matcher behind these tokens; after an error there is none.
    fn at(
        &mut self,
        constraint: &dyn Constraint,
        text: &[Token],
        branch: &[Token],
    ) -> Result<&mut dyn Matcher> {
        let mut matcher = match self.matcher.take() {
            Some(matcher) => matcher,
            None => {
                self.seen.clear();
                constraint.matcher()?
            }
        };
        let common = |a: &[Token], b: &[Token]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        // Mostly the whole text was seen, which is one comparison.
        let shared = match self.seen.strip_prefix(text) {
            Some(after) => text.len() + common(after, branch),
            None => common(&self.seen, text),
        };
        if shared < self.seen.len() {
            matcher.retreat(self.seen.len() - shared)?;
            self.seen.truncate(shared);
        }
        for &token in text.iter().chain(branch).skip(shared) {
            matcher.advance(token)?;
            self.seen.push(token);
        }
        Ok(&mut **self.matcher.insert(matcher))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts of the digits 0 to 2 that never fall, three long at most; 9 ends them. Counts its steps.
    #[derive(Debug, Default)]
    struct Rising;

    struct At(Vec<Token>);

    impl Constraint for Rising {
        fn matcher(&self) -> Result<Box<dyn Matcher>> {
            Ok(Box::new(At(Vec::new())))
        }

        fn is_end(&self, token: Token) -> bool {
            token == 9
        }
    }

    impl Matcher for At {
        fn advance(&mut self, token: Token) -> Result<()> {
            let falls = self.0.last().is_some_and(|&last| token < last);
            if falls || token > 2 || self.0.len() == 3 {
                return Err(Error::Grammar(format!("{token} may not follow")));
            }
            self.0.push(token);
            Ok(())
        }

        fn retreat(&mut self, tokens: usize) -> Result<()> {
            self.0.truncate(self.0.len() - tokens);
            Ok(())
        }

        fn allow(&mut self, mask: &mut Mask) -> Result<()> {
            mask.allow(9);
            if self.0.len() < 3 {
                (self.0.last().copied().unwrap_or(0)..=2).for_each(|token| mask.allow(token));
            }
            Ok(())
        }
    }

    #[test]
    fn a_guide_moves_from_path_to_path() {
        let guide = Guide::new(Arc::new(Rising), 2);
        let after = |text: &[Token], branch: &[Token]| -> Vec<Token> {
            guide.mask(Path { text, branch, guide: None }).tokens().collect()
        };
        assert_eq!(after(&[7, 7], &[]), [0, 1, 2, 9]);
        assert_eq!(after(&[7, 7], &[1, 2]), [2, 9]);
        assert_eq!(after(&[7, 7], &[1, 1]), [1, 2, 9]);
        assert_eq!(after(&[7, 7], &[2]), [2, 9]);
        assert_eq!(after(&[7, 7, 1], &[2, 2]), [9]);
        assert_eq!(after(&[7, 7, 1], &[9, 0]), [9]);
        // What may not follow is followed by nothing, and does no harm to other paths.
        assert!(after(&[7, 7, 1], &[0]).is_empty());
        assert_eq!(guide.refusal().to_string(), "0 may not follow");
        assert_eq!(after(&[7, 7, 1], &[]), [1, 2, 9]);
        // Another text of the same length.
        assert_eq!(after(&[7, 7, 2], &[]), [2, 9]);
        assert_eq!(guide.forced(&[7, 7, 2, 2, 2]), Some(9));
        assert_eq!(guide.forced(&[7, 7, 2, 2, 2, 9]), None);
        assert_eq!(guide.forced(&[7, 7, 2, 2]), None);
        assert!(guide.follows(&[7, 7, 0, 1, 9]) && !guide.follows(&[7, 7, 1, 0]));
    }

    #[test]
    fn a_mask_is_a_set() {
        let mut mask = Mask::default();
        let tokens = [0, 31, 32, 63, 70];
        tokens.iter().for_each(|&token| mask.allow(token));
        assert_eq!(mask.tokens().collect::<Vec<_>>(), tokens);
        assert!(mask.allows(70) && !mask.allows(71) && !mask.allows(1000));
        let logits: Vec<f32> = (0..80).map(|i| i as f32).collect();
        let mut masked = Vec::new();
        assert!(mask.apply(&logits, &mut masked));
        for (token, &x) in (0..).zip(&masked) {
            assert_eq!(x.is_finite(), tokens.contains(&token), "{token}");
        }
        // A shorter vocabulary has none of the others.
        [0, 31].iter().for_each(|&token| mask.forbid(token));
        assert!(!mask.apply(&logits[..32], &mut masked));
        assert!(mask.apply(&logits[..33], &mut masked) && masked[32] == 32.0);
        assert_eq!(mask.only(), None);
        [32, 70].iter().for_each(|&token| mask.forbid(token));
        assert_eq!(mask.only(), Some(63));
        mask.assign(&[u32::MAX]);
        assert!(mask.apply(&logits, &mut masked));
        assert_eq!((masked[..32] == logits[..32], masked[32]), (true, f32::NEG_INFINITY));
    }
}
