//! A gRPC service that is there before its server is: a node serves before it belongs to a cluster.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use futures::future::Either;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;

/// Answers `Unavailable` until its server is set, and then passes everything on to it.
pub struct Late<S> {
    server: Arc<OnceLock<S>>,
}

impl<S> std::fmt::Debug for Late<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Late")
            .field("is_set", &self.server.get().is_some())
            .finish()
    }
}

impl<S> Clone for Late<S> {
    fn clone(&self) -> Self {
        Late {
            server: self.server.clone(),
        }
    }
}

impl<S> Default for Late<S> {
    fn default() -> Self {
        Late {
            server: Arc::default(),
        }
    }
}

impl<S> Late<S> {
    /// Sets the server, once; a second one is ignored.
    pub fn set(&self, server: S) {
        let _ = self.server.set(server);
    }
}

impl<S: NamedService> NamedService for Late<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Late<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Generated servers are always ready; a clone is asked again in `call`.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.server.get() {
            Some(server) => Either::Left(server.clone().call(request)),
            None => Either::Right(ready(Ok(Status::unavailable(
                "this node belongs to no cluster yet",
            )
            .into_http()))),
        }
    }
}
