//! Connections: taken, watched, and let go.

use std::net::TcpListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::{State, routes};
use crate::error::{Error, Result};

/// The most connections at a time; further ones wait to be taken.
const MOST_CONNECTIONS: usize = 1024;
/// How long a client may take to say what it wants, or keep a connection that it does not use.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is looked whether the server is to stop.
const GLANCE: Duration = Duration::from_millis(50);
/// How long answers that were cut may take to say so.
const LAST_WORDS: Duration = Duration::from_millis(700);

/// Serves until `is_stopped`; then answers that run have `patience` to end, and are cut.
pub(super) async fn serve(
    listener: TcpListener,
    state: Arc<State>,
    is_stopped: impl Fn() -> bool,
    patience: Duration,
) -> Result<()> {
    let listener =
        tokio::net::TcpListener::from_std(listener).map_err(|e| Error::io("a socket", e))?;
    let router = routes::router(state.clone());
    let graceful = GracefulShutdown::new();
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut stopped = pin!(async {
        while !is_stopped() {
            sleep(GLANCE).await;
        }
    });
    loop {
        let accepted = pin!(async {
            let permit = connections.clone().acquire_owned().await;
            (permit, listener.accept().await)
        });
        let (permit, accepted) = match select(accepted, stopped.as_mut()).await {
            Either::Left((accepted, _)) => accepted,
            Either::Right(_) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // The client is gone, or there are no more files for now.
                tracing::warn!(%error, "a connection was not taken");
                sleep(GLANCE).await;
                continue;
            }
        };
        // Tokens are small, and somebody reads along.
        let _ = stream.set_nodelay(true);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
    drop(listener);
    state.pool.refuse();
    let mut ended = pin!(graceful.shutdown());
    if timeout(patience, ended.as_mut()).await.is_err() {
        state.pool.cut();
        // Whoever does not even take that is not waited for.
        let _ = timeout(LAST_WORDS, ended).await;
    }
    Ok(())
}
