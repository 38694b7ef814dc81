//! Who asks: proved at the door, looked at before each call, and carried along with what the call changes.
//!
//! Every call of the API goes through [`AdminService::asker`], in the one place where the generated service
//! hands it on. What is about one machine is looked at again where that machine is found
//! ([`Asker::may_touch`]), since only then its tags are known.

use std::collections::BTreeSet;

use cluster_model::trust::{self, Call, Sha256, Who};
use cluster_model::{Name, Vm, VmSpec};
use proto::token::parse_bearer;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Status};

use super::error::{invalid, status};
use super::service::AdminService;
use crate::trust::{Caller, Shown};

/// Where a node that hands a call on says for which local user it does so.
const FOR_LOCAL: &str = "baton-for-local";
/// Images and kernels that a person who is no admin may name lie here, on every node.
const IMAGE_FOLDER: &str = "/var/lib/baton/images/";

/// Who makes a call. Whatever a call reaches gets it as an argument: there is none to be had otherwise, since
/// only [`AdminService::asker`] makes one.
#[derive(Clone, Debug)]
pub struct Asker {
    who: Who,
    call: Call,
    from: String,
    credential: Option<String>,
}

impl Asker {
    /// Somebody, proved by a test.
    #[cfg(test)]
    pub(super) fn of(who: Who, call: Call) -> Asker {
        Asker {
            who,
            call,
            from: "test".into(),
            credential: None,
        }
    }

    /// Says to another node for whom the call is handed on to it.
    pub(super) fn hand_on(&self, metadata: &mut MetadataMap) {
        let (key, value) = match (&self.credential, &self.who) {
            (Some(credential), _) => ("authorization", credential.clone()),
            (None, Who::Local { uid }) => (FOR_LOCAL, uid.to_string()),
            _ => return,
        };
        if let Ok(value) = value.parse() {
            metadata.insert(key, value);
        }
    }

    /// What they are called in the log. A local user says so themselves; whoever may open the socket is root or
    /// the daemon, and could say anything.
    pub(super) fn name(&self, says: &str) -> String {
        match &self.who {
            Who::Bearer(bearer) => bearer.user.to_string(),
            Who::Local { .. } if says.is_empty() => "local".to_owned(),
            Who::Local { .. } => says.to_owned(),
            Who::Node(node) => node.to_string(),
            Who::Foreign(_) | Who::Nobody => "nobody".to_owned(),
        }
    }

    /// What the audit keeps of a change that they ask for.
    pub(super) fn record(&self, reason: &str) -> trust::Asked {
        trust::Asked {
            from: self.from.clone(),
            reason: reason.to_owned(),
            method: self.call.to_string(),
        }
    }

    /// What they showed, for the leader to look at.
    pub(super) fn credential(&self) -> Option<&str> {
        self.credential.as_deref()
    }

    /// The tags of the machines that they are narrowed to, if they are.
    pub(super) fn narrowed_to(&self) -> Option<&BTreeSet<Name>> {
        self.who.narrowed_to()
    }

    /// Whether they are shown this machine and what is about it.
    pub(super) fn sees(&self, vm: &Vm) -> bool {
        self.who.sees(vm)
    }

    /// Whether they are shown what is about a machine that may be gone: whoever is narrowed to some is not.
    pub(super) fn sees_what_is_of(&self, vm: Option<&Vm>) -> bool {
        vm.map_or(self.narrowed_to().is_none(), |vm| self.sees(vm))
    }

    /// Refuses the call when it may not be made on this machine; `None`: there is none of that name, which
    /// whoever is narrowed to tags does not learn.
    pub(super) fn may_touch(&self, vm: Option<&Vm>) -> Result<(), Status> {
        if self.narrowed_to().is_none() {
            return Ok(());
        }
        match vm {
            Some(_) => allowed(self, vm),
            None => Err(status(
                Code::PermissionDenied,
                "E-DENIED",
                format!(
                    "{} may not call {} on that machine: the token is for machines with certain tags only",
                    self.who, self.call
                ),
            )),
        }
    }

    /// Refuses a machine that they may not create: without one of their tags, or with files of the host that
    /// only an admin may name.
    pub(super) fn may_create<'p>(
        &self,
        spec: &VmSpec,
        files: impl Iterator<Item = &'p str>,
    ) -> Result<(), Status> {
        trust::authorise_new(&self.who, spec).map_err(|denied| refuse(self, &denied))?;
        if self.who.role() >= Some(trust::Role::Admin) {
            return Ok(());
        }
        if spec.witness.is_some() {
            return Err(status(
                Code::PermissionDenied,
                "E-DENIED",
                "a witness is a file on the hosts; only an admin may name one",
            ));
        }
        for path in files {
            let inside =
                path.starts_with(IMAGE_FOLDER) && !path.split('/').any(|part| part == "..");
            if !inside {
                return Err(status(
                    Code::PermissionDenied,
                    "E-DENIED",
                    format!(
                        "{path}: images and kernels lie in {IMAGE_FOLDER}; only an admin may name others"
                    ),
                ));
            }
        }
        Ok(())
    }
}

impl AdminService {
    /// Proves who makes a call, and refuses it where they may not.
    pub(super) fn asker<T>(&self, name: &str, request: &Request<T>) -> Result<Asker, Status> {
        let call = Call::parse(name)
            .ok_or_else(|| Status::internal(format!("{name} is in no table of calls")))?;
        let caller = request
            .extensions()
            .get::<Caller>()
            .cloned()
            .ok_or_else(|| Status::unauthenticated("it is not known who calls"))?;
        let (who, credential) = self.who(&caller, request.metadata())?;
        let asker = Asker {
            who,
            call,
            from: caller.from,
            credential,
        };
        // What narrowed tokens may do to a machine is looked at where the machine is known.
        if !(asker.who.narrowed_to().is_some() && call.concerns_machine()) {
            allowed(&asker, None)?;
        }
        Ok(asker)
    }

    fn who(
        &self,
        caller: &Caller,
        metadata: &MetadataMap,
    ) -> Result<(Who, Option<String>), Status> {
        let text = |key: &str| metadata.get(key).and_then(|value| value.to_str().ok());
        if let Some(header) = text("authorization") {
            let refused = |why: String| status(Code::Unauthenticated, "E-TOKEN", why);
            let (id, secret) = parse_bearer(header)
                .ok_or_else(|| refused("what came along is no access token".into()))?;
            let who = self
                .state()
                .bearer(id, &Sha256(secret.hash()), self.backend.wall_ms())
                .map_err(|refusal| refused(refusal.to_string()))?;
            return Ok((who, Some(header.to_owned())));
        }
        let who = match &caller.shown {
            Shown::Local { uid } => Who::Local { uid: *uid },
            Shown::Node(identity) => match text(FOR_LOCAL).map(str::parse) {
                // A voter holds the log and could write into it what it wants; its word is taken.
                Some(Ok(uid)) if self.may_lead(identity.node) => Who::Local { uid },
                _ => Who::Node(identity.node),
            },
            Shown::Foreign(name) => Who::Foreign(name.clone()),
            Shown::Nothing => Who::Nobody,
        };
        Ok((who, None))
    }

    fn may_lead(&self, node: cluster_model::NodeId) -> bool {
        self.state().peer_standing(node) == trust::Standing::Member { may_lead: true }
    }
}

fn allowed(asker: &Asker, on: Option<&Vm>) -> Result<(), Status> {
    trust::authorise(&asker.who, asker.call, on).map_err(|denied| refuse(asker, &denied))
}

fn refuse(asker: &Asker, denied: &trust::Denied) -> Status {
    metrics::counter!("clusterd_calls_refused_total").increment(1);
    tracing::warn!(from = asker.from, %denied, "refused");
    match asker.who {
        Who::Nobody => status(
            Code::Unauthenticated,
            "E-TOKEN",
            "it takes an access token; ask an admin for one (clusterctl token create), then: clusterctl context add NAME HOST:PORT",
        ),
        Who::Local { .. } | Who::Node(_) | Who::Bearer(_) | Who::Foreign(_) => {
            status(Code::PermissionDenied, "E-DENIED", denied.to_string())
        }
    }
}

/// Tags as they were asked for.
pub(super) fn tags(texts: &[String]) -> Result<BTreeSet<Name>, Status> {
    texts
        .iter()
        .map(|text| Name::new(text.as_str()).map_err(|error| invalid(format!("tag: {error}"))))
        .collect()
}
