//! The page: a chat that shows who wrote what. Its sources are in `web/page`; `page` has what its scripts are
//! compiled to.

use std::sync::Arc;

use axum::Router;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::routing::get;

use super::State;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Its files: path, type and text.
const FILES: [(&str, &str, &str); 9] = [
    ("/", HTML, include_str!("../../web/page/index.html")),
    ("/style.css", CSS, include_str!("../../web/page/style.css")),
    ("/page.js", JAVASCRIPT, include_str!("page/page.js")),
    ("/answer.js", JAVASCRIPT, include_str!("page/answer.js")),
    ("/api.js", JAVASCRIPT, include_str!("page/api.js")),
    ("/dom.js", JAVASCRIPT, include_str!("page/dom.js")),
    ("/settings.js", JAVASCRIPT, include_str!("page/settings.js")),
    ("/tokens.js", JAVASCRIPT, include_str!("page/tokens.js")),
    ("/icon.svg", SVG, include_str!("../../web/page/icon.svg")),
];

/// Its routes.
pub(super) fn router() -> Router<Arc<State>> {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, text)| {
        // A newer program has a newer page.
        let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache")];
        router.route(path, get(move || async move { (headers, text) }))
    })
}
