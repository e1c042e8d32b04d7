//! The few calls of etcd's v3 API that are made, with the names and field numbers of its `rpc.proto`; what is not used of
//! a message is left out.
//!
//! Written by hand: ten messages are no reason for a protobuf compiler in everybody's build.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::http::uri::PathAndQuery;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use prost::Message;
use tonic::client::Grpc;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{self, Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;
use tracing::debug;

use super::Credentials;
use crate::causes::{one_line, with_causes};

/// Each call must be answered within this, so that a server that went mute is noticed.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// One answer at most: a page of registrations takes some 2 MiB, an entry alone at most 1.5 MiB by etcd's own default.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

#[derive(Clone, PartialEq, Message)]
pub(super) struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The first key beyond the range; left out: the one key alone.
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
    #[prost(int64, tag = "3")]
    pub limit: i64,
    /// 0: now.
    #[prost(int64, tag = "4")]
    pub revision: i64,
    #[prost(bool, tag = "8")]
    pub keys_only: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
    /// There are more keys in the range than the limit allowed.
    #[prost(bool, tag = "3")]
    pub more: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ResponseHeader {
    #[prost(int64, tag = "3")]
    pub revision: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "5")]
    pub value: Bytes,
    /// 0 for none.
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct WatchRequest {
    /// One of a union's cases.
    #[prost(message, optional, tag = "1")]
    create_request: Option<WatchCreateRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchCreateRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    range_end: Bytes,
    #[prost(int64, tag = "3")]
    start_revision: i64,
    /// Large revisions come in several responses.
    #[prost(bool, tag = "8")]
    fragment: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchResponse {
    #[prost(bool, tag = "4")]
    pub canceled: bool,
    /// Above 0 where the watch asked for revisions that are no longer there.
    #[prost(int64, tag = "5")]
    pub compact_revision: i64,
    #[prost(string, tag = "6")]
    pub cancel_reason: String,
    #[prost(message, repeated, tag = "11")]
    pub events: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// 0 put, 1 deleted.
    #[prost(int32, tag = "1")]
    pub r#type: i32,
    #[prost(message, optional, tag = "2")]
    pub kv: Option<KeyValue>,
}

/// [`Event::type`](Event#structfield.type) of a key that is gone.
pub(super) const DELETE: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
    #[prost(int64, tag = "3")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantRequest {
    /// In seconds.
    #[prost(int64, tag = "1")]
    ttl: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    id: i64,
}

/// Of a call on one lease: to keep it alive, or to revoke it.
#[derive(Clone, PartialEq, Message)]
struct LeaseRequest {
    #[prost(int64, tag = "1")]
    id: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseKeepAliveResponse {
    /// 0 where the lease is gone.
    #[prost(int64, tag = "3")]
    ttl: i64,
}

/// An answer of which nothing is wanted.
#[derive(Clone, PartialEq, Message)]
struct Done {}

/// Without a `Debug` that would show the password.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    password: String,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct AuthenticateResponse {
    #[prost(string, tag = "2")]
    token: String,
}

/// One connection.
pub(super) struct Client<'a> {
    grpc: Grpc<Channel>,
    credentials: Option<&'a Credentials>,
    token: Option<AsciiMetadataValue>,
}

impl<'a> Client<'a> {
    /// Connects and, with credentials, authenticates.
    pub(super) async fn connect(endpoint: &Endpoint, credentials: Option<&'a Credentials>) -> Result<Self, Status> {
        let connecting = async { endpoint.connect().await.map_err(unavailable) };
        let grpc = Grpc::new(in_time(connecting).await?).max_decoding_message_size(MAX_ANSWER);
        let mut client = Self { grpc, credentials, token: None };
        client.authenticate().await?;
        Ok(client)
    }

    /// Authenticates once more where the token is no longer good.
    pub(super) async fn range(&mut self, request: RangeRequest) -> Result<RangeResponse, Status> {
        match self.call("/etcdserverpb.KV/Range", request.clone()).await {
            Err(status) if self.credentials.is_some() && is_stale_token(&status) => {
                debug!("etcd: the token is no longer good: {}", status.message());
                self.authenticate().await?;
                self.call("/etcdserverpb.KV/Range", request).await
            }
            answer => answer,
        }
    }

    /// What changes in the ranges from `revision` on. Returns once the first of the watches is there.
    pub(super) async fn watch(
        &mut self,
        ranges: impl IntoIterator<Item = (Bytes, Bytes)>,
        revision: i64,
    ) -> Result<Streaming<WatchResponse>, Status> {
        let create = |(key, range_end)| WatchRequest {
            create_request: Some(WatchCreateRequest { key, range_end, start_revision: revision, fragment: true }),
        };
        let requests: Vec<_> = ranges.into_iter().map(create).collect();
        // The server ends the watch where the requests end.
        let request = self.request(stream::iter(requests).chain(stream::pending()));
        let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        in_time(async {
            self.ready().await?;
            Ok(self.grpc.streaming(request, path, ProstCodec::default()).await?.into_inner())
        })
        .await
    }

    /// A lease of that many seconds, for a mock worker's entries.
    pub(super) async fn grant(&mut self, ttl: i64) -> Result<i64, Status> {
        let LeaseGrantResponse { id } = self.call("/etcdserverpb.Lease/LeaseGrant", LeaseGrantRequest { ttl }).await?;
        Ok(id)
    }

    /// Writes an entry that is gone with its lease.
    pub(super) async fn put(&mut self, key: &str, value: &str, lease: i64) -> Result<(), Status> {
        let request = PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), lease };
        let Done {} = self.call("/etcdserverpb.KV/Put", request).await?;
        Ok(())
    }

    /// Renews a lease.
    pub(super) async fn keep_alive(&mut self, id: i64) -> Result<(), Status> {
        let request = self.request(stream::iter([LeaseRequest { id }]));
        let path = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");
        let answer: Option<LeaseKeepAliveResponse> = in_time(async {
            self.ready().await?;
            self.grpc.streaming(request, path, ProstCodec::default()).await?.into_inner().message().await
        })
        .await?;
        let is_kept = answer.is_some_and(|answer| answer.ttl > 0);
        if is_kept { Ok(()) } else { Err(Status::not_found("the lease is gone")) }
    }

    /// Ends a lease, and with it its entries.
    pub(super) async fn revoke(&mut self, id: i64) -> Result<(), Status> {
        let Done {} = self.call("/etcdserverpb.Lease/LeaseRevoke", LeaseRequest { id }).await?;
        Ok(())
    }

    async fn authenticate(&mut self) -> Result<(), Status> {
        let Some(Credentials { name, password }) = self.credentials else { return Ok(()) };
        let request = AuthenticateRequest { name: name.clone(), password: password.0.clone() };
        self.token = None;
        match self.call("/etcdserverpb.Auth/Authenticate", request).await {
            Ok(AuthenticateResponse { token }) => {
                let mut token =
                    AsciiMetadataValue::try_from(token).map_err(|_| Status::internal("the token is none"))?;
                token.set_sensitive(true);
                self.token = Some(token);
                Ok(())
            }
            // Authentication is switched off there: anybody may read.
            Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
            Err(status) => Err(status),
        }
    }

    async fn call<Q, A>(&mut self, path: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let request = self.request(request);
        in_time(async {
            self.ready().await?;
            let codec = ProstCodec::<Q, A>::default();
            Ok(self.grpc.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
        })
        .await
    }

    async fn ready(&mut self) -> Result<(), Status> {
        self.grpc.ready().await.map_err(unavailable)
    }

    fn request<Q>(&self, message: Q) -> Request<Q> {
        let mut request = Request::new(message);
        // A member that is cut off from its cluster refuses, and ends its watches, instead of falling behind silently.
        request.metadata_mut().insert("hasleader", AsciiMetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }
}

/// There is no connection, and the status says why.
fn unavailable(error: transport::Error) -> Status {
    let mut status = Status::unavailable(with_causes(&error));
    status.set_source(Arc::new(error));
    status
}

/// Expired, of before the server's start, or of before a change of users and roles.
fn is_stale_token(status: &Status) -> bool {
    status.code() == Code::Unauthenticated
        || (status.code() == Code::InvalidArgument && status.message().contains("revision of auth store is old"))
}

/// Whether the server does not know the user, wants one, or lets them read too little.
pub(super) fn is_refusal(status: &Status) -> bool {
    matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument)
}

/// Whether the user may not read what was asked for.
pub(super) fn is_denied(status: &Status) -> bool {
    status.code() == Code::PermissionDenied
}

/// Whether the answer was larger than [`MAX_ANSWER`]. etcd uses the same code for revisions that are no longer there.
pub(super) fn is_too_large(status: &Status) -> bool {
    status.code() == Code::OutOfRange && status.message().contains("message length too large")
}

/// The status in a few words.
pub(super) fn told(status: &Status) -> String {
    let text = match status.source() {
        Some(source) if !status.message().contains(&source.to_string()) => {
            format!("{}: {}", status.message(), with_causes(source))
        }
        _ if status.message().is_empty() => status.code().description().to_owned(),
        _ => status.message().to_owned(),
    };
    one_line(&text)
}

async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded(format!("no answer within {}", humantime::format_duration(CALL_TIMEOUT)));
    tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(late)?
}
