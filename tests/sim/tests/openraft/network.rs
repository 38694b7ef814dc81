//! openraft's network as a heap of calls: the history decides which arrives, when, how often, and whose answer does.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use openraft::EmptyNode;
use openraft::alias::{SnapshotOf, VoteOf};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use tokio::sync::oneshot;

use crate::store::Types;

/// What is asked.
#[derive(Clone)]
pub enum Request {
    Vote(VoteRequest<Types>),
    Append(AppendEntriesRequest<Types>),
}

/// What is answered.
pub enum Answer {
    Vote(VoteResponse<Types>),
    Append(AppendEntriesResponse<Types>),
}

/// A call under way.
pub struct Call {
    pub from: usize,
    pub to: usize,
    pub request: Request,
    /// Gone in a call's second copy.
    pub answer: Option<oneshot::Sender<Answer>>,
    /// The history has seen that it was sent.
    pub seen: bool,
    /// The model's round in which it was sent.
    pub round: u64,
}

/// Every call under way.
#[derive(Clone, Default)]
pub struct Network(Arc<Mutex<Vec<Call>>>);

impl Network {
    /// Looks at the calls.
    pub fn with<T>(&self, look: impl FnOnce(&mut Vec<Call>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The network as `node` sees it.
    pub fn of(&self, node: usize) -> Factory {
        Factory {
            network: self.clone(),
            node,
        }
    }
}

/// Makes one node's clients.
pub struct Factory {
    network: Network,
    node: usize,
}

impl RaftNetworkFactory<Types> for Factory {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _: &EmptyNode) -> Client {
        Client {
            network: self.network.clone(),
            from: self.node,
            to: target as usize,
        }
    }
}

/// Speaks from one node to another.
pub struct Client {
    network: Network,
    from: usize,
    to: usize,
}

impl Client {
    async fn call(&self, request: Request) -> Result<Answer, RPCError<Types>> {
        let (sender, answer) = oneshot::channel();
        self.network.with(|calls| {
            calls.push(Call {
                from: self.from,
                to: self.to,
                request,
                answer: Some(sender),
                seen: false,
                round: 0,
            });
        });
        answer
            .await
            .map_err(|lost| RPCError::Unreachable(Unreachable::new(&lost)))
    }
}

impl RaftNetworkV2<Types> for Client {
    type SnapshotData = ();

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        match self.call(Request::Append(rpc)).await? {
            Answer::Append(answer) => Ok(answer),
            Answer::Vote(_) => unreachable!("the history answers what was asked"),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        _: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        match self.call(Request::Vote(rpc)).await? {
            Answer::Vote(answer) => Ok(answer),
            Answer::Append(_) => unreachable!("the history answers what was asked"),
        }
    }

    async fn full_snapshot(
        &mut self,
        _: VoteOf<Types>,
        _: SnapshotOf<Types, ()>,
        _: impl Future<Output = ReplicationClosed> + Send + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        unreachable!("snapshots are off")
    }
}
