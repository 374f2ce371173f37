//! The page: a chat that shows who wrote what.

use std::sync::Arc;

use axum::Router;

use super::State;

/// Its files.
pub(super) fn router() -> Router<Arc<State>> {
    Router::new()
}
