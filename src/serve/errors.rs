//! Errors as OpenAI's clients know them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::Error;

/// Why there is no answer.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    pub status: StatusCode,
    /// In a word, for programs.
    pub code: Option<&'static str>,
    /// A sentence.
    pub message: String,
    /// The member of the request that it is about.
    pub param: Option<String>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

/// An error as it is sent.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    pub error: ErrorDetails,
}

/// What is known of an error.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ErrorDetails {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

impl ApiError {
    fn of(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError { status, code: None, message: message.into(), param: None, retry_after: None }
    }

    /// A request that cannot be meant; `param` is the member that is wrong.
    pub fn invalid(param: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        let param = param.into().map(str::to_owned);
        ApiError { param, ..Self::of(StatusCode::BAD_REQUEST, message) }
    }

    /// What the server does not have.
    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::of(StatusCode::NOT_FOUND, message).with_code(code)
    }

    /// A request without a key, or with a wrong one.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::of(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key")
    }

    /// Too many wait already.
    pub fn busy(retry_after: u64) -> Self {
        let message = format!("the queue is full; try again in {retry_after} s or so");
        let error = Self::of(StatusCode::TOO_MANY_REQUESTS, message).with_code("queue_full");
        ApiError { retry_after: Some(retry_after), ..error }
    }

    /// The server ends.
    pub fn stopping() -> Self {
        Self::of(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping").with_code("stopping")
    }

    /// Any other status.
    pub fn with_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::of(status, message)
    }

    pub fn with_code(self, code: &'static str) -> Self {
        ApiError { code: Some(code), ..self }
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "unavailable_error",
            500..=599 => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// As it is sent.
    pub fn body(&self) -> ErrorBody {
        let (message, param) = (self.message.clone(), self.param.clone());
        ErrorBody { error: ErrorDetails { message, kind: self.kind(), param, code: self.code } }
    }
}

/// What the library reports of a request. What is wrong with the request itself was found before, so what remains
/// is mostly the machine's.
impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Invalid(_) | Error::Template(_) | Error::Grammar(_) => {
                Self::invalid(None, message)
            }
            Error::ContextFull { .. } => {
                Self::invalid(None, message).with_code("context_length_exceeded")
            }
            Error::Cancelled => Self::stopping(),
            Error::Memory { .. } => {
                Self::of(StatusCode::SERVICE_UNAVAILABLE, message).with_code("out_of_memory")
            }
            _ => Self::of(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
